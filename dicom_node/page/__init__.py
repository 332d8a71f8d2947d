"""The triage page: a process of its own, which reads what the node has written."""
