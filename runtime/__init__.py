"""A model bundle and slices in Hounsfield units in; labels, findings and a triage decision out.

numpy and an inference engine, nothing else: no pydicom, no torch, no patient data.
"""

import os

# From 1.29 on ONNX Runtime tells Microsoft of its process and its sessions, models' names and hashes among them, unless
# this is set before it starts; its own switch comes too late. Nothing leaves a hospital unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
