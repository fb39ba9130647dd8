"""Which detector a state dict belongs to, by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models import BACKBONES, assemble, prior_config
from utils.errors import UserError


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from that of one detector."""

    version: str
    size: int
    num_classes: int
    """With background."""
    missing: list[str]
    """Keys that only the detector has; batch counters, new in PyTorch 0.4.1, do not count."""
    unused: list[str]
    """Keys that only the state dict has."""
    wrong: list[str]
    """Keys of another shape, each as "key [2] instead of [64, 3, 3, 3]"."""
    not_compared: list[str]
    """A sentence for every version that cannot be built here."""

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unused) + len(self.wrong)

    @property
    def exact(self) -> bool:
        return self.count == 0


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """Return (version, size, num_classes) of the detector that has exactly these tensors.

    Batch counters may be missing.

    Raises:
        ValueError: no known detector has these tensors. The message names the closest detector, the
            first difference, and the detectors that cannot be built here to compare.
    """
    found = closest(state_dict)
    if found.exact:
        return found.version, found.size, found.num_classes
    differences = [
        *found.wrong,
        *(f"{key} is missing" for key in found.missing),
        *(f"{key} is not expected" for key in found.unused),
    ]
    first = f"{found.version} at {found.size}: {differences[0]}"
    raise ValueError(
        f"these tensors belong to no known detector; the closest differs in {found.count} of them "
        f"({'; '.join([first, *found.not_compared])})"
    )


def closest(state_dict: Mapping[str, Tensor]) -> Difference:
    """Return the difference to the detector, of any version and size, that has the fewest."""
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
    # A base that differs too much rules out its detectors before the rest of them is built.
    for least, version, base in sorted(bases, key=lambda entry: entry[0]):
        for size in BACKBONES[version].sizes:
            if found is not None and least >= found.count:
                return found
            priors = prior_config(version, "VOC", size)
            num_classes = _count_classes(shapes, priors.boxes_per_cell[0])
            with torch.device("meta"):
                net = assemble(BACKBONES[version], base, priors, num_classes)
            differences = _compare(net.state_dict(), shapes)
            if found is None or sum(map(len, differences)) < found.count:
                found = Difference(version, size, num_classes, *differences, not_compared)
    return found


def _compare(
    expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Return what is missing, unused and wrong, as ``Difference`` has them."""
    counter = "num_batches_tracked"
    missing = [key for key in expected if key not in shapes and not key.endswith(counter)]
    unused = [key for key in shapes if key not in expected]
    wrong = [
        f"{key} {list(shapes[key])} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in shapes and shapes[key] != tuple(tensor.shape)
    ]
    return missing, unused, wrong


def _count_classes(shapes: Mapping[str, tuple[int, ...]], boxes_per_cell: int) -> int:
    """Return the number of classes with background that the first class head has, at least 2."""
    rows = shapes.get("conf.0.weight", ())
    count = rows[0] // boxes_per_cell if rows else 0
    # A made-up tensor may claim more rows than can be compared to.
    return count if 2 <= count < 1 << 20 else 2
