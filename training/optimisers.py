"""The optimisers that a recipe may name, and the course of their learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import lr_scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from training.recipe import Training


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for the kernels of convolutions, AdamW for what is left, both at one learning rate.

    PyTorch's Muon takes matrices. A kernel is one, of as many rows as it has output channels; updates are scaled to the
    size that AdamW's would have (Liu et al., arXiv:2502.16982).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        parameters = list(parameters)
        self._kernels = [p for p in parameters if p.ndim > 1]
        self._matrices = [nn.Parameter(_matrix(p.detach(), of=p)) for p in self._kernels]  # the same memory
        super().__init__(self._matrices, lr=lr, weight_decay=weight_decay, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        self._rest = torch.optim.AdamW([p for p in parameters if p.ndim == 1], lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else _matrix(kernel.grad, of=kernel)
        for group in self._rest.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        super().step(closure)
        self._rest.step()

    def state_dict(self) -> dict[str, Any]:
        return {"kernels": super().state_dict(), "rest": self._rest.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["kernels"])
        self._rest.load_state_dict(state_dict["rest"])


def _matrix(tensor: Tensor, *, of: Tensor) -> Tensor:
    """A kernel or its gradient with one row per output channel, the columns as they lie in the kernel's memory."""
    last = of.ndim == 4 and of.is_contiguous(memory_format=torch.channels_last)
    return (tensor.movedim(1, -1) if last else tensor).reshape(len(tensor), -1)


_OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "muon": Muon,
    "rmsprop": torch.optim.RMSprop,
}


def optimiser(settings: Training, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return _OPTIMISERS[settings.optimiser](parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def schedule(settings: Training, optimiser: torch.optim.Optimizer, steps: int) -> Any:
    """One cycle (Smith & Topin, arXiv:1708.07120), a cut after validations without a better Dice or loss, or none."""
    if settings.schedule == "one_cycle":
        return lr_scheduler.OneCycleLR(
            optimiser,
            settings.learning_rate,
            total_steps=steps,
            pct_start=0.2,
            cycle_momentum=settings.optimiser != "muon",
        )
    if settings.schedule == "plateau":
        # PyTorch cuts when more than `patience` epochs were no better; papers say after how many it is cut
        mode = "max" if settings.watch == "dice" else "min"
        return lr_scheduler.ReduceLROnPlateau(optimiser, mode, factor=settings.factor, patience=settings.patience - 1)
    return None
