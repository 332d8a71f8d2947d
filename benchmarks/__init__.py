import runtime  # noqa: F401  # before ONNX Runtime, whose telemetry it switches off
