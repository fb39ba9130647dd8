"""Which detector a state dict belongs to, by the names and shapes of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import BACKBONES, assemble, prior_config
from models.base_weights import compare
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
    differences = [*found.wrong, *(f"{key} is missing" for key in found.missing),
                   *(f"{key} is not expected" for key in found.unused)]
    first = f"{found.version} at {found.size}: {differences[0]}"
    raise ValueError("these tensors belong to no known detector; the closest differs in "
                     f"{found.count} of them ({'; '.join([first, *found.not_compared])})")


def closest(state_dict: Mapping[str, Tensor]) -> Difference:
    """Return the difference to the detector, of any version and size, that has the fewest."""
    in_base = {key.removeprefix("base."): tensor for key, tensor in state_dict.items()
               if key.startswith("base.")}
    bases, not_compared = bases_here()
    least = {version: sum(map(len, compare(base.state_dict(), in_base)))
             for version, base in bases.items()}
    found = None
    # A base that differs too much rules out its detectors before the rest of them is built.
    for version in sorted(bases, key=least.__getitem__):
        for size in BACKBONES[version].sizes:
            if found is not None and least[version] >= found.count:
                return found
            priors = prior_config(version, "VOC", size)
            num_classes = _count_classes(state_dict, priors.boxes_per_cell[0])
            with torch.device("meta"):
                net = assemble(BACKBONES[version], bases[version], priors, num_classes)
            differences = compare(net.state_dict(), state_dict)
            if found is None or sum(map(len, differences)) < found.count:
                found = Difference(version, size, num_classes, *differences, not_compared)
    return found


def bases_here() -> tuple[dict[str, nn.Module], list[str]]:
    """Return the base networks by version, without data, and why others cannot be built here."""
    bases, reasons = {}, []
    for version, row in BACKBONES.items():
        try:
            with torch.device("meta"):
                bases[version] = row.base()
        except UserError as error:
            reasons.append(f"{version} was not compared: {error}")
    return bases, reasons


def _count_classes(state_dict: Mapping[str, Tensor], boxes_per_cell: int) -> int:
    """Return the number of classes with background that the first class head has, at least 2."""
    head = state_dict.get("conf.0.weight")
    count = head.shape[0] // boxes_per_cell if head is not None and head.dim() else 0
    # A made-up tensor may claim more rows than can be compared to.
    return count if 2 <= count < 1 << 20 else 2
