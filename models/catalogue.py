"""Every architecture by name: where it comes from, what its paper measured, what it costs.

Nothing is imported before it is built, so that listing the networks needs neither MONAI nor time.
"""

from __future__ import annotations

import copy
import importlib
import weakref
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable


class CatalogueError(ValueError):
    """An architecture, or a setting of one, that does not exist here."""


@dataclass(frozen=True)
class Architecture:
    """One row of the catalogue.

    Parameters
    ----------
    module, config, network : module in `models`, its config class and its network class
    dimensions : 2 for ``(N, C, H, W)``, 3 for ``(N, C, D, H, W)``
    paper : where the network, and its use on brain haemorrhage, were published
    headline : what the paper measured, on its own data and not comparable with another's
    widths : which widths the paper gives, which are ours and why
    multiple : config -> the number whose multiples every side of the input must be

    """

    module: str
    config: str
    network: str
    dimensions: Literal[2, 3]
    paper: str
    headline: str
    widths: str
    multiple: Callable[[Any], int]

    def load(self) -> tuple[type[Any], type[nn.Module]]:
        """Import the config class and the network class.

        Raises
        ------
        CatalogueError : a package that this architecture needs is not installed

        """
        try:
            module = importlib.import_module(f"models.{self.module}")
        except ImportError as error:
            raise _missing(self.network, error) from error
        return getattr(module, self.config), getattr(module, self.network)


def _missing(network: str, error: ImportError) -> CatalogueError:
    return CatalogueError(f"{network} needs a package that is not installed (pip install monai einops): {error}")


def _halved_between_levels(config: Any) -> int:
    return 2 ** (len(config.channels) - 1)


LIU = 'S. Liu, "Comparing Augmented U-Net Models For Segmentation of Hematomas" (MRI)'
PRADANA = 'Pradana et al., "Evaluation of EMA-Attention U-Net for Brain Hemorrhage Segmentation"'
PENG = "Peng et al., Front. Neurosci. 2022, doi:10.3389/fnins.2022.965680"
SUBARACHNOID = "U-Net against Attention U-Net for subarachnoid haemorrhage, submitted to JoWUA in 2025"

ARCHITECTURES = MappingProxyType(
    {
        "res_unet": Architecture(
            module="res_unet",
            config="ResUNetConfig",
            network="ResUNet",
            dimensions=2,
            paper="none: U-Net, arXiv:1505.04597, with residual blocks, arXiv:1512.03385",
            headline="none published: the shipped bundle carries its own scores",
            widths="ours, for two cores",
            multiple=lambda config: 2 ** len(config.channels),
        ),
        "vanilla_unet": Architecture(
            module="vanilla_unet",
            config="VanillaUNetConfig",
            network="VanillaUNet",
            dimensions=2,
            paper=LIU,
            headline="Dice .8359",
            widths="from the paper's count, 31,114,305, which they meet exactly",
            multiple=_halved_between_levels,
        ),
        "dr_unet": Architecture(
            module="dr_unet",
            config="DRUNetConfig",
            network="DRUNet",
            dimensions=2,
            paper=f"{LIU}; Yu et al., Stroke 2021, doi:10.1161/STROKEAHA.120.032243",
            headline="Dice .8361",
            widths="from the paper's count, 10,953,249, which they meet exactly",
            multiple=_halved_between_levels,
        ),
        "dense_unet": Architecture(
            module="dense_unet",
            config="DenseUNetConfig",
            network="DenseUNet",
            dimensions=2,
            paper=f"{LIU}; Xu et al., Front. Neurosci. 2021, doi:10.3389/fnins.2020.541817",
            headline="Dice .8281",
            widths="growth and layers the paper's; stem, bottlenecks and decoder ours, after DenseNet and U-Net",
            multiple=lambda config: 2 ** len(config.blocks),
        ),
        "attention_unet": Architecture(
            module="attention_unet",
            config="AttentionUNetConfig",
            network="AttentionUNet",
            dimensions=2,
            paper=PRADANA,
            headline="Dice .1420, IoU .0982, precision .2031, recall .6927 (over all classes); 7.5 ms on an RTX A4000",
            widths="from the paper's count, 7,791,285, which they meet exactly",
            multiple=_halved_between_levels,
        ),
        "wide_attention_unet": Architecture(
            module="attention_unet",
            config="WideAttentionUNetConfig",
            network="AttentionUNet",
            dimensions=2,
            paper=f"{PENG}; {SUBARACHNOID}",
            headline="Dice .893, IoU .859, HD95 7.25 mm (Peng et al.); Dice .896, IoU .877 (subarachnoid)",
            widths="ours, U-Net's 64 to 1,024: neither paper gives any",
            multiple=_halved_between_levels,
        ),
        "ema_attention_unet": Architecture(
            module="ema_attention_unet",
            config="EMAAttentionUNetConfig",
            network="EMAAttentionUNet",
            dimensions=2,
            paper=PRADANA,
            headline="Dice .2898, IoU .2475, precision .3837, recall .6476 (over all classes); 11.0 ms on an RTX A4000",
            widths="from the paper's count, 7,794,805, which they meet exactly",
            multiple=_halved_between_levels,
        ),
        "attention_res_unet": Architecture(
            module="attention_res_unet",
            config="AttentionResUNetConfig",
            network="AttentionResUNet",
            dimensions=2,
            paper="BMC Med. Inform. Decis. Mak. 2025, doi:10.1186/s12911-025-03131-3",
            headline="Dice .93 SAH, .93 SDH, .92 EDH, .90 contusion, .88 IVH, .92 ICH; Hausdorff 2.1 to 2.7 mm",
            widths="ours, half of U-Net's: the abstract gives none",
            multiple=_halved_between_levels,
        ),
        "resnet34_unet": Architecture(
            module="resnet34_unet",
            config="ResNet34UNetConfig",
            network="ResNet34UNet",
            dimensions=2,
            paper=SUBARACHNOID,
            headline="Dice .867, IoU .848, precision .725, recall .478",
            widths="the encoder is ResNet34; the decoder's are ours, those of segmentation_models_pytorch",
            multiple=lambda _: 32,
        ),
        "att_focus_net": Architecture(
            module="att_focus_net",
            config="AttFocusNetConfig",
            network="AttFocusNet",
            dimensions=2,
            paper=PENG,
            headline="Dice .908, IoU .874, sensitivity .913, PPV .957, HD95 5.96 mm, ICC .997; CQ500 .889, RSNA .911",
            widths="the focus structure's C / 2 is the paper's; the levels are ours, U-Net's 64 to 1,024",
            multiple=_halved_between_levels,
        ),
        "unet_plus_plus": Architecture(
            module="unet_plus_plus",
            config="UNetPlusPlusConfig",
            network="UNetPlusPlus",
            dimensions=2,
            paper=f"{PENG}; Zhou et al., IEEE Trans. Med. Imaging 2020, doi:10.1109/TMI.2019.2959609",
            headline="Dice .900, IoU .865, HD95 6.83 mm",
            widths="those of Zhou et al.: Peng et al. give none",
            multiple=_halved_between_levels,
        ),
        "pranet": Architecture(
            module="pranet",
            config="PraNetConfig",
            network="PraNet",
            dimensions=2,
            paper=f"{PENG}; Fan et al., MICCAI 2020, arXiv:2006.11392",
            headline="Dice .788, IoU .716, HD95 16.01 mm",
            widths="those of Fan et al.: Peng et al. give none",
            multiple=lambda _: 32,
        ),
        "unet_3d": Architecture(
            module="unet_3d",
            config="UNet3DConfig",
            network="UNet3D",
            dimensions=3,
            paper=f"{PENG}; Çiçek et al., MICCAI 2016, arXiv:1606.06650",
            headline="Dice .857, IoU .806, HD95 6.87 mm",
            widths="ours, MONAI's BasicUNet at about the size of Çiçek et al.: Peng et al. give none",
            multiple=lambda _: 16,
        ),
        "unetr": Architecture(
            module="unetr",
            config="UNETRConfig",
            network="UNETR",
            dimensions=3,
            paper=f"{PENG}; Hatamizadeh et al., WACV 2022, arXiv:2103.10504",
            headline="Dice .700, IoU .638, HD95 13.67 mm",
            widths="those of Hatamizadeh et al., with their 96 x 96 x 96 voxels: Peng et al. give none",
            multiple=lambda _: 16,
        ),
    }
)


def configure(name: str, /, **settings: Any) -> Any:
    """An architecture's config: the paper's, but for the settings given. Lists, as TOML has them, become tuples.

    Raises
    ------
    CatalogueError : no such architecture, or no such setting of it, with those that there are

    """
    if name not in ARCHITECTURES:
        raise CatalogueError(f"no architecture {name!r}: choose from {', '.join(ARCHITECTURES)}")
    config, _ = ARCHITECTURES[name].load()
    known = [field.name for field in fields(config)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise CatalogueError(f"{name} has no setting {', '.join(unknown)}: it has {', '.join(known)}")
    return config(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def build(name: str, /, **settings: Any) -> nn.Module:
    """A network with fresh weights, in training mode, its config at ``.config``.

    Raises
    ------
    CatalogueError : no such architecture, no such setting, or a package that is missing

    """
    config = configure(name, **settings)
    _, network = ARCHITECTURES[name].load()
    try:
        return network(config)
    except ImportError as error:  # MONAI finds out only now that einops is not there
        raise _missing(name, error) from error


def side_multiple(name: str, /, **settings: Any) -> int:
    """What every side of the input must be a multiple of.

    Raises
    ------
    CatalogueError : as `configure`

    """
    config = configure(name, **settings)
    return ARCHITECTURES[name].multiple(config)


def parameters(network: nn.Module) -> int:
    """Learned parameters; batch norm's running statistics are none."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def gflops(network: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Floating-point operations of one inference, in 1e9: one multiply-accumulate is two.

    Convolutions and matrix products only; papers that count multiply-accumulates give half of it. Nothing is computed,
    the shapes alone pass through the network.

    Parameters
    ----------
    input_shape : ``(N, C, H, W)`` or ``(N, C, D, H, W)``

    """
    return inference_cost(network, input_shape)[0]


def peak_memory(network: nn.Module, input_shape: tuple[int, ...], *, training: bool = False) -> int:
    """Bytes of the tensors alive at once, at most, while one batch passes in float32: an estimate, from shapes alone.

    The input and everything computed from it, in training also what the backward pass keeps and the gradients of the
    weights; not the weights, the optimiser, or the workspace of a convolution library.

    Parameters
    ----------
    input_shape : ``(N, C, H, W)`` or ``(N, C, D, H, W)``
    training : a forward and a backward pass instead of an inference

    """
    network = _shapes_only(network).train(training)
    with torch.set_grad_enabled(training), _Live() as live:
        output = network(torch.zeros(input_shape, device="meta"))
        if training:
            torch.stack([logits.sum() for logits in tree_leaves(output)]).sum().backward()
    return live.peak


def inference_cost(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[float, int]:
    """`gflops` and `peak_memory` of an inference, of one pass of the shapes."""
    network = _shapes_only(network).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Live() as live:
        network(torch.zeros(input_shape, device="meta"))
    return counter.get_total_flops() / 1e9, live.peak


def _shapes_only(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).to("meta")


class _Live(TorchDispatchMode):
    """Bytes of storage made while it is on and not yet freed; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001
        if key in self.seen:
            return  # a view
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size
