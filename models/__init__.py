"""Detectors by name: the only place that knows which base, extras and priors fit together."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.config import MOBILE_PRIORS, PRIORS, PriorConfig
from models.classifiers import MobileNetV2Base, ResNet101Base
from models.hardnet import HARDNET_SPECS, Bridge, DepthwiseBridge, HarDNetBase
from models.rfb import RFBNet, rfb_extras
from models.ssd import SSD, Detector, ssd_extras, ssd_extras_stride32
from models.vgg import VGGBase
from utils.errors import UserError

__all__ = ["BACKBONES", "SIZES", "SSD", "build_net", "identify", "prior_config"]


@dataclass(frozen=True)
class Backbone:
    """A detector: its base network, what stands on it, and where weights of the base come from."""

    base: Callable[[], nn.Module]
    bridge: Callable[[int], nn.Module] | None
    """From the channels of the base's end: what stands between that and source 2."""
    weights: str
    """Name of the file for ``--basenet``."""
    detector: Callable[..., Detector] = SSD
    extras: Callable[[int, int], nn.ModuleList] = ssd_extras
    """From the channels of the base's end and the size of the input."""
    priors: Mapping[tuple[str, int], PriorConfig] = field(default_factory=lambda: PRIORS)
    """Prior boxes by data set and size; the sizes that are there are those that can be built."""
    classifier: str | None = None
    """Name of the published ImageNet classifier's file whose layers the base is made of."""
    classifier_keys: str = ""
    """Pattern of those keys of that file that belong to the base; its group is the base's key."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({size for _, size in self.priors}))

    def from_classifier(self, key: str) -> str | None:
        """Where a tensor of the ImageNet classifier belongs in ``base``.

        Args:
            key: a key of the classifier's state dict, e.g. ``base.8.layers.3.conv.weight`` (the
                HarDNets), ``layer1.0.conv1.weight`` (ResNet101), ``features.0.0.weight``
                (MobileNetV2), without DataParallel's ``module.``.

        Returns:
            The key of ``base.state_dict()``, without ``base.``; None for a tensor that the base
            has no place for (the last stages and the head), and where no classifier is known.
            Some bases have tensors that no classifier has: HarDNet68's bridge is ``13.*``.
        """
        match = re.fullmatch(self.classifier_keys, key)
        return match[1] if match and self.classifier else None


def _hardnet(depth: int | str) -> Callable[[], nn.Module]:
    return lambda: HarDNetBase(HARDNET_SPECS[depth])


def _stages(last: int) -> str:
    """Keys of a HarDNet classifier's layers 0 to ``last``, which are the same in the base."""
    return rf"base\.((?:{'|'.join(map(str, range(last + 1)))})\..+)"


_HARDNET68 = {"classifier": "hardnet68-5d684880.pth", "classifier_keys": _stages(12)}
_HARDNET85 = {"classifier": "hardnet85-a28faa00.pth", "classifier_keys": _stages(14)}
_RFB = {"detector": RFBNet, "extras": rfb_extras}

BACKBONES = {
    "SSD_HarDNet68": Backbone(_hardnet(68), None, "hardnet68_base_bridge.pth", **_HARDNET68),
    "SSD_HarDNet85": Backbone(_hardnet(85), Bridge, "hardnet85_base.pth", **_HARDNET85),
    "SSD_vgg": Backbone(VGGBase, None, "vgg16_reducedfc.pth"),
    "SSD_resnet101": Backbone(
        ResNet101Base,
        None,
        "resnet101-63fe2227.pth",
        classifier="resnet101-63fe2227.pth",
        classifier_keys=r"((?!fc\.).+)",
    ),
    "SSD_mobile": Backbone(
        MobileNetV2Base,
        None,
        "mobilenet_v2-b0353104.pth",
        extras=ssd_extras_stride32,
        priors=MOBILE_PRIORS,
        classifier="mobilenet_v2-b0353104.pth",
        classifier_keys=r"features\.(.+)",
    ),
    "SSD_HarDNet68ds": Backbone(
        _hardnet("68ds"),
        DepthwiseBridge,
        "hardnet68ds-632474d2.pth",
        classifier="hardnet68ds-632474d2.pth",
        classifier_keys=_stages(12),
    ),
    "SSD_HarDNet39ds": Backbone(
        _hardnet("39ds"),
        DepthwiseBridge,
        "hardnet39ds-0e6c6fa9.pth",
        classifier="hardnet39ds-0e6c6fa9.pth",
        classifier_keys=_stages(10),
    ),
    "RFB_HarDNet68": Backbone(
        _hardnet(68), None, "hardnet68_base_bridge.pth", **_RFB, **_HARDNET68
    ),
    "RFB_HarDNet85": Backbone(_hardnet(85), None, "hardnet85_base.pth", **_RFB, **_HARDNET85),
}

SIZES = tuple(sorted({size for _, size in PRIORS}))


def prior_config(version: str, dataset: str, size: int) -> PriorConfig:
    """The prior boxes of the detector ``version`` at ``size``, as ``dataset`` (VOC, COCO) has them.

    Raises:
        ValueError: no such version, size or data set; the sentence names those that there are.
    """
    if version not in BACKBONES:
        raise ValueError(f"unknown version {version!r}, choose from {', '.join(BACKBONES)}")
    row = BACKBONES[version]
    if size not in row.sizes:
        sizes = ", ".join(map(str, row.sizes))
        raise ValueError(f"{version} does not exist at size {size!r}, choose from {sizes}")
    if (dataset, size) not in row.priors:
        datasets = ", ".join(name for name, other in row.priors if other == size)
        raise ValueError(f"no prior boxes for the data set {dataset!r}, choose from {datasets}")
    return row.priors[dataset, size]


def build_net(version: str, size: int, num_classes: int) -> Detector:
    """The detector ``version`` for S x S images with new weights.

    Args:
        version: a key of ``BACKBONES``.
        size: 300 or 512, the side S of the network's input; SSD_mobile exists at 300 only.
        num_classes: classes including background (index 0): 21 for VOC, 81 for COCO.

    Returns:
        A module that maps images [B, 3, S, S] to (loc [B, P, 4], conf [B, P, num_classes]), with
        P = 11,620 (300) or 32,756 (512), or ``prior_config(...).num_priors`` of them. No file is
        read and nothing is printed. Bases, bridges and receptive-field blocks start from Kaiming
        normal (fan-out) convolutions, all other convolutions from PyTorch's default with zero
        bias.

    Raises:
        ValueError: an unknown version or size, fewer than two classes, or a network whose source
            maps do not have the sizes that the prior boxes are made for.
        UserError: torchvision, whose layers SSD_resnet101 and SSD_mobile are made of, cannot be
            imported.
    """
    # Which data set's boxes are meant does not matter here: only their number per cell does.
    priors = prior_config(version, "VOC", size)
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}, but background and one class make 2")
    net = _assemble(BACKBONES[version], priors, num_classes)
    sides = _source_sides(net, size)
    if sides != priors.feature_maps:
        raise ValueError(
            f"{version} at {size} has source maps of {sides}, the prior boxes are made for "
            f"{priors.feature_maps}"
        )
    return net


def _assemble(row: Backbone, priors: PriorConfig, num_classes: int) -> Detector:
    base = row.base()
    channels = base.out_channels[1]
    extras = row.extras(channels, priors.size)
    bridge = [row.bridge(channels)] if row.bridge else []
    return row.detector(base, extras, priors.boxes_per_cell, num_classes, *bridge)


def _source_sides(net: Detector, size: int) -> tuple[int, ...]:
    """Sides of the source maps for a size x size input, by shape propagation without data."""
    tensors = net.state_dict(keep_vars=True).values()
    shadow = copy.deepcopy(net, memo={id(t): t.to("meta") for t in tensors}).eval()
    with torch.no_grad():
        sources = shadow.sources(torch.empty(1, 3, size, size, device="meta"))
    return tuple(source.shape[-1] for source in sources)


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """Which detector a state dict belongs to: (version, size, num_classes), by names and shapes.

    Raises:
        ValueError: no known detector has exactly these tensors; the sentence names the first
            difference to the closest one, and those that cannot be built here to compare.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    closest: tuple[int, str] | None = None
    unknown = ""
    for version, row in BACKBONES.items():
        for size in row.sizes:
            priors = prior_config(version, "VOC", size)
            num_classes = _count_classes(shapes, priors.boxes_per_cell[0])
            try:
                with torch.device("meta"):
                    expected = _assemble(row, priors, num_classes).state_dict()
            except UserError as error:
                unknown += f"; {version} was not compared: {error}"
                break
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
        f"({closest[1]}){unknown}"
    )


def _count_classes(shapes: Mapping[str, tuple[int, ...]], boxes_per_cell: int) -> int:
    rows = shapes.get("conf.0.weight", ())
    return max(2, rows[0] // boxes_per_cell) if rows else 2
