"""What export raises on purpose; it needs no torch."""

from __future__ import annotations

from runtime.errors import ScansideError


class ExportError(ScansideError):
    """A network that can't become a bundle, or a bundle that can't become a server's model."""
