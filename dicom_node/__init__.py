"""The service; `dicom_node.node` puts it together.

The way of a slice: ``network`` has the association, ``intake`` takes it, ``storage`` keeps it. `assembler` knows which
series it belongs to, and when that is complete (`backlog`: while the journal is away); `dispatch` tells the worker
process, which `supervisor` keeps alive. There, ``images`` says whether it is analysed, ``analysis`` does so, and
``results`` writes what was found. ``delivery`` brings that to archives, ``alerts`` tells people, ``page`` shows it.

Beside it: ``configuration``; ``monitoring``, what others see of a running node; ``operation``, what its operator asks;
``simulation``, a scanner, an archive and phantoms; `service` (signals), `reload`, `retention`, `status`, and `folder`,
the same analysis without a node.

Who may import whom is another order: ``tests/test_architecture.py`` has it.
"""
