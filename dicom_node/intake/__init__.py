"""What scanners send (C-STORE), say of it (MPPS) and ask about it (storage commitment)."""
