"""Checkpoints: tensors and plain data only, written atomically, read without executing anything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import atomic_write

_FORMAT = 1


def save_checkpoint(path: Path, state: Mapping) -> None:
    """Write ``state`` (tensors, numbers, strings, lists and dicts of them) to ``path``.

    The file appears whole or not at all; a failure leaves an earlier one of that name as it was.
    """
    with atomic_write(path) as file:
        torch.save({"format": _FORMAT, **state}, file)


def load_checkpoint(path: str | Path) -> dict:
    """Read one of our checkpoints, or a bare state dict such as the published files.

    Returns:
        A dict that has at least "model": the state dict, without DataParallel's ``module.``
        prefix. Ours has "config", "classes", "optimizer" and more beside it.

    Raises:
        UserError: no such file, not a checkpoint, a damaged one, or one that would run code.
    """
    state = _load(Path(path))
    if isinstance(state.get("model"), Mapping):
        if state.get("format", _FORMAT) != _FORMAT:
            raise UserError(
                f"{path} has checkpoint format {state['format']}, this code reads "
                f"{_FORMAT}; update the code"
            )
        return {**state, "model": _tensors(path, state["model"])}
    return {"model": _tensors(path, state)}


def load_base(base: nn.Module, path: str | Path) -> int:
    """Load pretrained ``base`` weights; returns how many tensors there were.

    Args:
        base: the base network; every one of its tensors must be in the file.
        path: a file with keys of ``base`` (``0.conv.weight``), with or without the prefixes
            ``base.`` and ``module.``.

    Raises:
        UserError: as ``load_checkpoint``, or tensors missing, of another shape, or left over; the
            sentence lists them.
    """
    state = load_checkpoint(path)["model"]
    state = {key.removeprefix("base."): tensor for key, tensor in state.items()}
    expected = base.state_dict()
    wrong = [
        f"{key} {list(state[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    # PyTorch before 0.4.1 did not store the batch counters, which evaluation does not need.
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    extra = [key for key in state if key not in expected]
    if wrong or missing or extra:
        loaded = sum(key in state and state[key].shape == t.shape for key, t in expected.items())
        raise UserError(
            f"{path}: only {loaded} of the base network's {len(expected)} tensors would be loaded"
            + _list("of another shape", wrong)
            + _list("missing", missing)
            + _list("unexpected", extra)
        )
    base.load_state_dict(state, strict=False)
    return len(expected)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a whole state dict into ``net``; UserError, naming ``path``, unless all of it fits."""
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(f"{path} does not fit the network: {reasons}") from error


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def rng_state() -> dict[str, Tensor | list[Tensor]]:
    """State of PyTorch's generators (data order and augmentation have their own, by seed)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping) -> None:
    """Restore ``rng_state``; CUDA states are used when there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _load(path: Path) -> Mapping:
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; give the path of a checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes inside the reader
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} is damaged, is not a PyTorch file, or holds more than tensors and plain data "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); files that "
            "would run code are not opened"
        ) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _tensors(path: str | Path, state: Mapping) -> dict[str, Tensor]:
    strangers = [
        str(key)
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strangers or not state:
        raise UserError(
            f"{path} holds no state dict" + _list("entries that are no named tensors", strangers)
        )
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _list(what: str, names: list[str], most: int = 20) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; {len(names)} {what}: {', '.join(names[:most])}{more}"
