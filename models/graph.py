"""Hounsfield units in, labels out: what surrounds every network, in training, calibration and service alike.

Windows, normalisation and resizing are part of the module, so they exist once: training calls `prepare`, export traces
`forward`, and the node feeds int32 HU of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class HeadCT(nn.Module):
    """A network between its pre- and post-processing.

    Parameters
    ----------
    network : ``(N, K * C, G, G)`` in [0, 1] -> logits ``(N, classes, G, G)``, or in a volume ``(N, C, K, G, G)`` ->
        ``(N, classes, K, G, G)``; one logit where its ``config.classes`` is 1: blood alone, of two classes
    windows_hu : (lower, upper) Hounsfield units of each of the C windows of a slice; their ends map to 0 and 1
    grid : G, edge in pixels of the network's own grid
    shown, answered : K slices that the network sees at once, and A in the middle that `forward` answers: 1 of a slice
        between its neighbours, more of a volume

    """

    def __init__(
        self,
        network: nn.Module,
        windows_hu: tuple[tuple[float, float], ...],
        grid: int,
        shown: int = 1,
        answered: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        self.grid = grid
        self.shown, self.answered = shown, answered
        self.volumetric = answered > 1
        self.lone = network.config.classes == 1
        lower = torch.tensor([w[0] for w in windows_hu], dtype=torch.float32)[:, None, None]
        upper = torch.tensor([w[1] for w in windows_hu], dtype=torch.float32)[:, None, None]
        self.register_buffer("lower", lower)
        self.register_buffer("width", upper - lower)

    def prepare(self, hu: Tensor) -> Tensor:
        """HU ``(N, K, H, W)`` of any number type -> the network's input, float32 in [0, 1].

        K slices in the order of the stack; each gives one channel per window.
        Windowed before it is resized: bone would otherwise smear into the brain beside it.
        """
        x = hu.to(torch.float32)[:, :, None]  # (N, K, 1, H, W)
        x = ((x - self.lower) / self.width).clamp(0, 1).flatten(1, 2)  # (N, K * C, H, W)
        x = functional.interpolate(x, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return x.unflatten(1, (self.shown, -1)).transpose(1, 2) if self.volumetric else x

    def complete(self, logits: Tensor) -> Tensor:
        """Give a network for one class its background: softmax of (0, z) is the sigmoid of z."""
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if self.lone else logits

    def forward(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """HU ``(N, K, H, W)`` int32 -> what the service needs of N * A slices, and no more bytes than that.

        Returns
        -------
        labels : ``(N * A, H, W)`` uint8, class index per pixel
        evidence : ``(N * A, classes)`` float32, highest probability of each class on the network's grid

        """
        return self.answer(self.network(self.prepare(hu)), hu)

    def answer(self, logits: Tensor, hu: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns, from the network's own logits; of `hu` only the size is asked for."""
        logits = self.complete(logits)
        if self.volumetric:
            first = (self.shown - self.answered) // 2
            logits = logits[:, :, first : first + self.answered].transpose(1, 2).flatten(0, 1)
        # softmax in parts: along this axis ONNX Runtime's own takes ten times as long
        powers = torch.exp(logits - logits.amax(dim=1, keepdim=True))
        evidence = (powers / powers.sum(dim=1, keepdim=True)).amax(dim=(2, 3))
        full = functional.interpolate(logits, size=hu.shape[2:], mode="bilinear", align_corners=False)
        labels = full.argmax(dim=1).to(torch.float32)  # (N * A, H, W); TensorRT makes uint8 of nothing else
        return labels.to(torch.uint8), evidence
