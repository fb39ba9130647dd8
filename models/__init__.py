"""Detectors by name: the only place that knows which base, extras and priors fit together."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.config import MOBILE_PRIORS, PRIORS, PriorConfig
from models.hardnet import HARDNET_SPECS, Bridge, DepthwiseBridge, HarDNetBase
from models.rfb import RFBNet, rfb_extras
from models.ssd import SSD, Detector, ssd_extras, ssd_extras_stride32
from models.torchvision_bases import MobileNetV2Base, ResNet101Base
from models.vgg import VGGBase
from utils.errors import UserError

__all__ = ["BACKBONES", "SIZES", "SSD", "build_net", "closest", "identify", "prior_config"]


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


def _assemble(
    row: Backbone, priors: PriorConfig, num_classes: int, base: nn.Module | None = None
) -> Detector:
    base = row.base() if base is None else base
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


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from that of a detector; the lists are empty where it does not."""

    version: str
    size: int
    num_classes: int
    missing: list[str]
    """Keys of the detector, without batch counters, which PyTorch before 0.4.1 did not store."""
    unused: list[str]
    """Keys that the detector does not have."""
    wrong: list[str]
    """Contradictions of shape, each "key [2] instead of [64, 3, 3, 3]"."""
    not_compared: list[str]
    """A sentence for every version that cannot be built here."""

    def __len__(self) -> int:
        return len(self.missing) + len(self.unused) + len(self.wrong)


def closest(state_dict: Mapping[str, Tensor]) -> Difference:
    """The detector, of any version, size and number of classes, that has the fewest differences."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    in_base = {key: shape for key, shape in shapes.items() if key.startswith("base.")}
    bases, not_compared = [], []
    for version, row in BACKBONES.items():
        try:
            with torch.device("meta"):
                base = row.base()
        except UserError as error:
            not_compared.append(f"{version} was not compared: {error}")
            continue
        expected = {f"base.{key}": tensor for key, tensor in base.state_dict().items()}
        bases.append((sum(map(len, _compare(expected, in_base))), version, base))
    found = None
    # What differs in the base alone rules most detectors out before the rest of them is built.
    for least, version, base in sorted(bases, key=lambda entry: entry[0]):
        for size in BACKBONES[version].sizes:
            if found is not None and least >= len(found):
                return found
            priors = prior_config(version, "VOC", size)
            num_classes = _count_classes(shapes, priors.boxes_per_cell[0])
            with torch.device("meta"):
                net = _assemble(BACKBONES[version], priors, num_classes, base)
            differences = _compare(net.state_dict(), shapes)
            if found is None or sum(map(len, differences)) < len(found):
                found = Difference(version, size, num_classes, *differences, not_compared)
    return found


def _compare(
    expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Missing and unused keys, and contradictions of shape, as ``Difference`` has them."""
    counter = "num_batches_tracked"
    missing = [key for key in expected if key not in shapes and not key.endswith(counter)]
    unused = [key for key in shapes if key not in expected]
    wrong = [
        f"{key} {list(shapes[key])} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in shapes and shapes[key] != tuple(tensor.shape)
    ]
    return missing, unused, wrong


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """Which detector a state dict belongs to: (version, size, num_classes), by names and shapes.

    Batch counters may be missing.

    Raises:
        ValueError: no known detector has exactly these tensors; the sentence names the first
            difference to the closest one, and those that cannot be built here to compare.
    """
    found = closest(state_dict)
    if not found:
        return found.version, found.size, found.num_classes
    first = [
        *found.wrong,
        *(f"{key} is missing" for key in found.missing),
        *(f"{key} is not expected" for key in found.unused),
    ][0]
    raise ValueError(
        f"these tensors belong to no known detector; the closest differs in {len(found)} of them "
        f"({'; '.join([f'{found.version} at {found.size}: {first})', *found.not_compared])}"
    )


def _count_classes(shapes: Mapping[str, tuple[int, ...]], boxes_per_cell: int) -> int:
    rows = shapes.get("conf.0.weight", ())
    count = rows[0] // boxes_per_cell if rows else 0
    # A made-up tensor can claim more rows than can be compared to.
    return count if 2 <= count < 1 << 20 else 2
