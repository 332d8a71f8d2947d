"""The service. `dicom_node.node` puts it together; the folders follow a slice from the scanner to the archive.

``network``: associations, as acceptor and as requestor. ``intake``: what scanners send and say. ``storage``: what is on
disk and in the database. ``images``: what a stored image is, and whether it is analysed. ``analysis``: the worker
process. ``results``: what it writes. ``delivery``: to archives. ``alerts``: to people. ``page``: the triage page.

Beside them: ``configuration``; ``monitoring``, what others see of a running node; ``operation``, what its operator
asks; ``simulation``, a scanner, an archive and phantoms.
"""
