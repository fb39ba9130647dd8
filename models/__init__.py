"""Detectors by name: the only place that knows which base, extras and priors fit together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.config import PRIORS
from models.hardnet import HARDNET_SPECS, Bridge, HarDNetBase
from models.ssd import SSD, ssd_extras
from models.vgg import VGGBase

__all__ = ["BACKBONES", "SIZES", "SSD", "build_net", "identify"]


@dataclass(frozen=True)
class Backbone:
    """How to build a base network, what stands between it and source 2, and its weights' name."""

    base: Callable[[], nn.Module]
    bridge: Callable[[int], nn.Module] | None
    weights: str


BACKBONES = {
    "SSD_HarDNet68": Backbone(
        lambda: HarDNetBase(HARDNET_SPECS[68]), None, "hardnet68_base_bridge.pth"
    ),
    "SSD_HarDNet85": Backbone(lambda: HarDNetBase(HARDNET_SPECS[85]), Bridge, "hardnet85_base.pth"),
    "SSD_vgg": Backbone(VGGBase, None, "vgg16_reducedfc.pth"),
}

SIZES = (300, 512)


def build_net(version: str, size: int, num_classes: int) -> SSD:
    """The detector ``version`` for S x S images with new weights.

    Args:
        version: a key of ``BACKBONES``.
        size: 300 or 512, the side S of the network's input.
        num_classes: classes including background (index 0): 21 for VOC, 81 for COCO.

    Returns:
        A module that maps images [B, 3, S, S] to (loc [B, P, 4], conf [B, P, num_classes]), with
        P = 11,620 (300) or 32,756 (512). No file is read and nothing is printed. The base and
        the bridge start from Kaiming normal (fan-out) convolutions, all other convolutions from
        PyTorch's default with zero bias.

    Raises:
        ValueError: an unknown version or size, fewer than two classes, or a network whose source
            maps do not have the sizes that the prior boxes are made for.
    """
    if version not in BACKBONES:
        raise ValueError(f"unknown version {version!r}, choose from {', '.join(BACKBONES)}")
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}, choose from {', '.join(map(str, SIZES))}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, but background and one class make 2")
    backbone = BACKBONES[version]
    # Which data set's boxes are meant does not matter here: only their number per cell does.
    priors = PRIORS["VOC", size]
    base = backbone.base()
    channels = base.out_channels[1]
    net = SSD(
        base,
        ssd_extras(channels, size),
        priors.boxes_per_cell,
        num_classes,
        backbone.bridge(channels) if backbone.bridge else None,
    )
    sides = _source_sides(net, size)
    if sides != priors.feature_maps:
        raise ValueError(
            f"{version} at {size} has source maps of {sides}, the prior boxes are made for "
            f"{priors.feature_maps}"
        )
    return net


def _source_sides(net: SSD, size: int) -> tuple[int, ...]:
    """Sides of the source maps for a size x size input, by shape propagation without data."""
    tensors = net.state_dict(keep_vars=True).values()
    shadow = copy.deepcopy(net, memo={id(t): t.to("meta") for t in tensors})
    with torch.no_grad():
        sources = shadow.sources(torch.empty(1, 3, size, size, device="meta"))
    return tuple(source.shape[-1] for source in sources)


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """Which detector a state dict belongs to: (version, size, num_classes), by names and shapes.

    Raises:
        ValueError: no known detector has exactly these tensors; the sentence names the first
            difference to the closest one.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    closest: tuple[int, str] | None = None
    for version in BACKBONES:
        for size in SIZES:
            num_classes = _count_classes(shapes, PRIORS["VOC", size].boxes_per_cell[0])
            with torch.device("meta"):
                expected = build_net(version, size, num_classes).state_dict()
            wrong = [
                f"{key} {list(shapes[key])} where {list(tensor.shape)} is expected"
                if key in shapes
                else f"{key} is missing"
                for key, tensor in expected.items()
                if shapes.get(key) != tuple(tensor.shape)
            ]
            wrong += [f"{key} is not expected" for key in shapes if key not in expected]
            if not wrong:
                return version, size, num_classes
            if closest is None or len(wrong) < closest[0]:
                closest = len(wrong), f"{version} at {size}: {wrong[0]}"
    raise ValueError(
        f"these tensors belong to no known detector; the closest differs in {closest[0]} of them "
        f"({closest[1]})"
    )


def _count_classes(shapes: Mapping[str, tuple[int, ...]], boxes_per_cell: int) -> int:
    rows = shapes.get("conf.0.weight", ())
    return max(2, rows[0] // boxes_per_cell) if rows else 2
