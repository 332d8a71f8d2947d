"""Associations (PS3.8), DIMSE messages and TLS, with peers that call and peers that are called."""
