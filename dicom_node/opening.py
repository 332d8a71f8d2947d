"""What parts of the node take from its configuration: the worker's opening, and who may connect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dicom_node.configuration.config import Config


def limits(config: Config) -> dict[str, Any]:
    """Who may connect, and how many."""
    names = ("allowed_calling_aes", "allowed_addresses", "max_associations", "max_associations_per_peer")
    return {name: getattr(config.node, name) for name in names}


def opening(config: Config) -> dict[str, Any]:
    """What a new worker has to know."""
    return {
        "do": "open",
        "bundle": str(config.model.bundle) if config.model.bundle else None,
        "backend": config.model.backend,
        "precision": config.model.precision,
        "plans": str(config.model.plans) if config.model.plans else None,
        "trusted_keys": [str(key) for key in config.model.trusted_keys],
        "threads": config.model.threads,
        "triton": config.triton.model_dump() if config.triton else None,
        "max_batch": config.model.max_batch,
        "min_slices": config.series.min_slices,
        "min_coverage_mm": config.series.min_coverage_mm,
        "max_lossy_ratio": config.series.max_lossy_ratio,
        "bone_kernels": config.series.bone_kernels,
        "triage": [rule.model_dump(mode="json") for rule in config.triage],
        "results": config.results.model_dump(mode="json"),
        "codes": [row.model_dump(mode="json") for row in config.codes],
        "log_level": config.log.level,
        "log_format": config.log.format,
    }
