"""Detectors by name. This file alone says which parts and prior boxes go together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from data.config import MOBILE_PRIORS, PRIORS, PriorConfig
from models.base import NormedConv2d, on_meta
from models.hardnet import HARDNET_SPECS, Bridge, DepthwiseBridge, HarDNetBase
from models.rfb import RFBNet, rfb_extras
from models.ssd import SSD, STRIDE32, Detector, ssd_extras
from models.torchvision_bases import MobileNetV2Base, ResNet101Base
from models.vgg import VGGBase

__all__ = ["BACKBONES", "SIZES", "SSD", "Backbone", "build_net", "prior_config"]


@dataclass(frozen=True)
class Backbone:
    """A detector without its weights: a base network, and what stands on it."""

    base: Callable[[], nn.Module]  # makes the base network, which returns two feature maps
    bridge: Callable[[int], nn.Module] | None = None
    """Makes what stands between the end of the base, of so many channels, and source 2."""
    detector: Callable[..., Detector] = SSD
    extras: Callable[[int, int], nn.ModuleList] = ssd_extras
    """Makes the extra layers, from the channels of the base's end and the size of the input."""
    priors: Mapping[tuple[str, int], PriorConfig] = field(default_factory=lambda: PRIORS)
    """Prior boxes by data set and input size. The detector exists at these sizes."""
    classifier: str | None = None
    """Prefix of the base's layers in the state dict of the ImageNet classifier that they are taken
    from, None if there is no such classifier."""
    new: tuple[str, ...] = ()  # prefixes of the base's layers that the classifier does not have

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({size for _, size in self.priors}))


_BASE = {name: partial(HarDNetBase, spec) for name, spec in HARDNET_SPECS.items()}
_HARDNET68 = {"base": _BASE[68], "classifier": "base.", "new": ("13.",)}
_HARDNET85 = {"base": _BASE[85], "classifier": "base."}
_DEPTHWISE = {"bridge": DepthwiseBridge, "classifier": "base."}
_NORMED = {"detector": partial(SSD, conv=NormedConv2d),
           "extras": partial(ssd_extras, conv=NormedConv2d)}
_RFB = {"detector": RFBNet, "extras": rfb_extras}

BACKBONES = {
    "SSD_HarDNet68": Backbone(**_HARDNET68),
    "SSD_HarDNet85": Backbone(**_HARDNET85, bridge=Bridge),
    "SSD_vgg": Backbone(VGGBase),
    "SSD_resnet101": Backbone(ResNet101Base, classifier=""),
    "SSD_mobile": Backbone(MobileNetV2Base, extras=partial(ssd_extras, steps=STRIDE32),
                           priors=MOBILE_PRIORS, classifier="features."),
    "SSD_HarDNet68ds": Backbone(_BASE["68ds"], **_DEPTHWISE),
    "SSD_HarDNet39ds": Backbone(_BASE["39ds"], **_DEPTHWISE),
    "SSD_HarDNet68bn": Backbone(**_HARDNET68, **_NORMED),
    "SSD_HarDNet39dsbn": Backbone(_BASE["39ds"], **_DEPTHWISE, **_NORMED),
    "RFB_HarDNet68": Backbone(**_HARDNET68, **_RFB),
    "RFB_HarDNet85": Backbone(**_HARDNET85, **_RFB),
}
"""The detectors by version. ``models.pretrained.PUBLISHED`` lists the files for their bases."""

SIZES = tuple(sorted({size for _, size in PRIORS}))


def prior_config(version: str, priors: str, size: int) -> PriorConfig:
    """Return the prior boxes of a detector.

    Args:
        version: a key of ``BACKBONES``.
        priors: "VOC" or "COCO", whose objects the boxes suit, or sizes of one's own in pixels of
            the input, as ``PriorConfig.text`` gives them.
        size: the side of the network's input.

    Raises ValueError: an unknown version, size or name; the message names those that exist. Or
    sizes that do not fit the source maps.
    """
    if version not in BACKBONES:
        raise ValueError(f"unknown version {version!r}, choose from {', '.join(BACKBONES)}")
    row = BACKBONES[version]
    if size not in row.sizes:
        sizes = ", ".join(map(str, row.sizes))
        raise ValueError(f"{version} does not exist at size {size!r}, choose from {sizes}")
    if (priors, size) in row.priors:
        return row.priors[priors, size]
    try:
        return next(own for (_, s), own in row.priors.items() if s == size).with_sizes(priors)
    except ValueError as error:
        names = ", ".join(name for name, other in row.priors if other == size)
        raise ValueError(f"no prior boxes {priors!r}, choose from {names}, or give sizes "
                         f"({error})") from None


def build_net(version: str, size: int, num_classes: int) -> Detector:
    """Build a detector with new weights. No file is read and nothing is printed.

    Bases, bridges and receptive-field blocks start from Kaiming normal (fan-out) convolutions, all
    other convolutions from PyTorch's default with zero bias.

    Args:
        version: a key of ``BACKBONES``.
        size: the side S of the network's input, 300 or 512; SSD_mobile exists at 300 only.
        num_classes: classes including background (index 0): 21 for VOC, 81 for COCO.

    The module maps images [B, 3, S, S] to (loc [B, P, 4], conf [B, P, num_classes]). P is
    ``prior_config(...).num_priors``: 11,620 at 300 and 32,756 at 512, fewer for SSD_mobile.

    Raises:
        ValueError: an unknown version or size, fewer than two classes, or source maps whose sizes
            are not those that the prior boxes are made for.
        UserError: torchvision cannot be imported, which SSD_resnet101 and SSD_mobile need.
    """
    # Data sets differ in the sizes of their boxes, not in the number of boxes per cell.
    priors = prior_config(version, "VOC", size)
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, but background and one class make 2")
    row = BACKBONES[version]
    net = assemble(row, row.base(), priors, num_classes)
    with torch.no_grad():
        maps = on_meta(net).eval().sources(torch.empty(1, 3, size, size, device="meta"))
    sides = tuple(each.shape[-1] for each in maps)
    if sides != priors.feature_maps:
        raise ValueError(f"{version} at {size} has source maps of {sides}, the prior boxes are "
                         f"made for {priors.feature_maps}")
    return net


def assemble(row: Backbone, base: nn.Module, priors: PriorConfig, num_classes: int) -> Detector:
    """Build the detector of ``row`` on ``base``, without comparing its source maps to priors."""
    channels = base.out_channels[1]
    extras = row.extras(channels, priors.size)
    bridge = [row.bridge(channels)] if row.bridge else []
    return row.detector(base, extras, priors.boxes_per_cell, num_classes, *bridge)
