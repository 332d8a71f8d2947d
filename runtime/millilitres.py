"""How a volume is told to people: by everyone in the same words, and never as none at all where there is some."""

from __future__ import annotations

LEAST_ML = 0.01  # that two places can show


def said(volume_ml: float) -> str:
    """A volume with its unit: ``"31.2 ml"``, ``"0.52 ml"``, ``"under 0.01 ml"``."""
    if 0 < volume_ml < LEAST_ML / 2:
        return f"under {LEAST_ML:g} ml"
    return f"{volume_ml:.1f} ml" if volume_ml >= 1 else f"{volume_ml:.2f} ml"
