"""Pretrained weights of a base network: of a base file, a detector, or an ImageNet classifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from models import BACKBONES, Backbone
from utils.checkpoint import list_keys, load_checkpoint, load_weights
from utils.errors import UserError
from utils.logger import LOGGER


@dataclass(frozen=True)
class BaseMatch:
    """Which tensors of a file are those of a base network."""

    source: str  # what the file holds: "a base network", "the base of a detector" or "a classifier"
    total: int  # number of the base network's tensors
    tensors: dict[str, Tensor]  # the matching tensors, by key of the base network
    unused: list[str]  # keys of the file that are not used
    missing: list[str]
    """Keys of the base network that the file does not have, without batch counters."""
    wrong: list[str]  # keys of another shape, each as "key [2] instead of [64, 3, 3, 3]"
    fits: bool  # whether the file has all of the base network that a file of its kind has


def match_base(base: Mapping[str, Tensor], state: Mapping[str, Tensor],
               row: Backbone) -> BaseMatch:
    """Find a base network's tensors in a file.

    The file is read as a base network or detector, and if it does not fit, as a classifier.

    Args:
        base: the base network's state dict.
        state: the file's, without DataParallel's prefix: keys of the base with or without
            ``base.``, a whole detector, or a classifier.
        row: says how the classifier's keys begin, and what of the base it does not have.
    """
    heads = ("loc.", "conf.", "extras.", "L2Norm.")
    detector = any(key.startswith(heads) for key in state)
    prefix = "base." if any(key.startswith("base.") for key in state) else ""
    names = _without(prefix, state)
    if detector or len(names) < len(state):
        source = "the base of a detector"
    elif any(name not in base for name in names.values()):
        source = "a classifier"
    else:
        source = "a base network"
    direct = _match(source, base, state, names)
    # A detector without a part of its base is damaged; it is not a classifier.
    if direct.fits or detector or row.classifier is None:
        return direct
    names = _without(row.classifier, state)
    classifier = _match("a classifier", base, state, names, row.new)
    return classifier if len(classifier.tensors) >= len(direct.tensors) else direct


def _without(prefix: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: key.removeprefix(prefix) for key in state if key.startswith(prefix)}


def compare(expected: Mapping[str, Tensor],
            found: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the keys that ``found`` lacks, those it has more, and those of another shape.

    Missing batch counters do not count: PyTorch before 0.4.1 did not store them, and evaluation
    does not need them. A wrong key reads "key [2] instead of [64, 3, 3, 3]".
    """
    counter = "num_batches_tracked"
    missing = [key for key in expected if key not in found and not key.endswith(counter)]
    unused = [key for key in found if key not in expected]
    wrong = [f"{key} {list(found[key].shape)} instead of {list(tensor.shape)}"
             for key, tensor in expected.items()
             if key in found and found[key].shape != tensor.shape]
    return missing, unused, wrong


def _match(source: str, base: Mapping[str, Tensor], state: Mapping[str, Tensor],
           names: Mapping[str, str], new: tuple[str, ...] = ()) -> BaseMatch:
    """Match by ``names``: key of the file -> key of the base; ``new`` need not be in the file."""
    names = {key: name for key, name in names.items() if name in base and not name.startswith(new)}
    found = {name: state[key] for key, name in names.items()}
    missing, _, wrong = compare(base, found)
    return BaseMatch(source=source, total=len(base),
                     tensors={name: t for name, t in found.items() if t.shape == base[name].shape},
                     unused=[key for key in state if key not in names], missing=missing,
                     wrong=wrong, fits=not wrong and all(key.startswith(new) for key in missing))


def load_base(base: nn.Module, path: str | Path, version: str) -> BaseMatch:
    """Load pretrained weights into ``base``, and log what of the file and the base is left out.

    Args:
        base: the base network.
        path: a file with keys of ``base`` (``0.conv.weight``), with or without the prefixes
            ``base.`` and ``module.``; a whole detector on this base; or a classifier.
        version: the detector of ``BACKBONES`` that ``base`` is part of.

    Raises UserError: as ``load_checkpoint`` and ``load_weights``, or tensors are missing or of
    another shape. The message lists them.
    """
    match = match_base(base.state_dict(), load_checkpoint(path)["model"], BACKBONES[version])
    if not match.fits:
        loaded = f"only {len(match.tensors)} of the base network's {match.total} tensors fit"
        keys = {"of another shape": match.wrong, "missing": match.missing, "unused": match.unused}
        lists = [list_keys(names, what) for what, names in keys.items() if names]
        raise UserError(f"{path}: {'; '.join([loaded, *lists])}")
    load_weights(base, base.state_dict() | match.tensors, path)
    for what, names in (("not used", match.unused), ("of the base network new", match.missing)):
        if names:
            LOGGER.info("%s: %s", path, list_keys(names, what))
    return match
