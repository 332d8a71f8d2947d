"""The node's surroundings for demo, tests and benchmarks: a scanner, an archive, phantoms as files."""
