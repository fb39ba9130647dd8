"""Checkpoints: tensors and plain data only, written atomically, read without executing anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import atomic_write, file_digest

_FORMAT = 1
_SAFETENSORS = ".safetensors"


def save_checkpoint(path: Path, state: Mapping, previous: Path | None = None) -> None:
    """Write ``state`` (tensors, numbers, strings, lists and dicts of them) to ``path``.

    The file appears whole or not at all. A failure leaves an earlier file of that name as it was.
    ``previous`` is where the earlier file is kept, as in ``atomic_write``.
    """
    with atomic_write(path, previous) as file:
        torch.save({"format": _FORMAT, **state}, file)


def load_checkpoint(path: str | Path, mmap: bool = False) -> dict:
    """Read a checkpoint of this program, a bare state dict, or one of them as ``.safetensors``.

    Args:
        path: the file.
        mmap: read tensors only when they are used. It makes reading the other entries cheap, and
            needs a file of PyTorch 1.6 or newer.

    Returns:
        A dict with at least "model": the state dict, without DataParallel's ``module.`` prefix. A
        checkpoint of this program has more: "config", "classes", "optimizer" and others; a
        ``.safetensors`` file keeps "config" and "classes". If another program has put the state
        dict under "state_dict", "beside" has the names of its other entries.

    Raises:
        UserError: the file does not exist, is damaged, is no checkpoint, would run code, or has
            entries that are not what a checkpoint has under their names.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a checkpoint in it, such as last.pth")
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; give the path of a checkpoint")
    state = _load_safetensors(path) if path.suffix == _SAFETENSORS else _load_torch(path, mmap)
    if isinstance(state.get("model"), Mapping):
        _check_entries(path, state)
        named = {key: value for key, value in state.items() if _is_text(key)}
        return {**named, "model": _tensors(path, state["model"])}
    if isinstance(state.get("state_dict"), Mapping):
        beside = [key for key in state if _is_text(key) and key != "state_dict"]
        model = {"model": _tensors(path, state["state_dict"])}
        return {**model, "beside": beside} if beside else model
    return {"model": _tensors(path, state)}


def save_safetensors(path: Path, model: Mapping[str, Tensor], about: Mapping) -> None:
    """Write a state dict as ``.safetensors``, with the values of ``about`` as JSON metadata.

    The format does not keep the order of tensors; the metadata keep it.

    Raises:
        UserError: the package safetensors is not installed, the file cannot be written, or the
            format cannot hold a tensor or a value of ``about``.
    """
    _import_safetensors(path)
    from safetensors.torch import save

    about = {**about, "keys": list(model)}
    try:
        # The format has neither strides nor tensors that share memory.
        tensors = {k: tensor.detach().cpu().contiguous().clone() for k, tensor in model.items()}
        data = save(tensors, {key: json.dumps(value) for key, value in about.items()})
    except Exception as error:  # the package raises various types
        raise UserError(
            f"{path} cannot be written: safetensors cannot hold this ({_reason(error)}); keep it "
            "as .pth"
        ) from error
    with atomic_write(path) as file:
        file.write(data)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a whole state dict into ``net``; UserError, naming ``path``, unless all of it fits.

    Batch counters may be missing: PyTorch before 0.4.1 did not store them.
    """
    try:
        # PyTorch fills in missing counters only if the state dict has no version, as a plain dict.
        net.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(f"{path} does not fit the network: {reasons}") from error


def sha256_of(path: str | Path) -> str:
    """Return the hex SHA-256 of a file."""
    return file_digest(path, "sha256")


def rng_state() -> dict[str, Tensor | list[Tensor]]:
    """Return the state of PyTorch's generators (data order and augmentation do not use them)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping) -> None:
    """Restore ``rng_state``; CUDA states only if the number of devices is the same."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def list_keys(names: Sequence[str], what: str = "", most: int = 20) -> str:
    """Return "3 missing: a, b, c" for names that are ``what``, cut at ``most`` of them."""
    title = f"{len(names)} {what}" if what else str(len(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title}: {', '.join(names[:most])}{more}"


def _load_torch(path: Path, mmap: bool) -> Mapping:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        raise UserError(
            f"{path} is damaged, is not a PyTorch file, or holds more than tensors and plain data "
            f"({_reason(error)}); files that would run code are not opened"
        ) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _load_safetensors(path: Path) -> dict:
    safetensors = _import_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # as above, and for dtypes that PyTorch does not have
        raise UserError(
            f"{path} is damaged, or is not a safetensors file that can be read ({_reason(error)})"
        ) from error
    try:
        about = {k: json.loads(about[k]) for k in ("config", "classes", "keys") if k in about}
    except (ValueError, RecursionError) as error:
        reason = _reason(error)
        raise UserError(f"{path}: its metadata are none of this program ({reason})") from error
    keys = about.pop("keys", None)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if named and len(keys) == len(tensors) and tensors.keys() == set(keys):
        tensors = {key: tensors[key] for key in keys}
    return {**about, "model": tensors}


def _import_safetensors(path: Path) -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise UserError(
            f"{path} needs the package safetensors, which is not installed; pip install safetensors"
        ) from error
    return safetensors


def _check_entries(path: Path, state: Mapping) -> None:
    """Raise UserError unless format, classes and configuration are of the right kinds."""
    found = state.get("format", _FORMAT)
    if not (isinstance(found, int) and found == _FORMAT):
        kind = repr(found) if isinstance(found, (int, str)) else f"a {type(found).__name__}"
        raise UserError(
            f"{path} has checkpoint format {kind}, this code reads {_FORMAT}; update the code"
        )
    classes = state.get("classes", [])
    if not (isinstance(classes, (list, tuple)) and all(map(_is_text, classes))):
        raise UserError(f'{path} has "classes" that are not a list of names; it is no checkpoint')
    try:
        if not isinstance(state.get("config", {}), Mapping):
            raise ValueError(f"it is a {type(state['config']).__name__}")
        json.dumps(state.get("config"))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} has a configuration that is not plain data by name ({_reason(error)}); it is "
            "no checkpoint"
        ) from error


def _is_text(value: object) -> bool:
    """Return whether it is a string that can be encoded, without lone surrogates."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def _name(key: object) -> str:
    if isinstance(key, str):
        return key if _is_text(key) else ascii(key)
    return str(key) if isinstance(key, int) else f"a {type(key).__name__}"


def _is_plain(tensor: Tensor) -> bool:
    on_cpu = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return on_cpu and not (tensor.is_nested or tensor.is_quantized or tensor.is_complex())


def _reason(error: Exception) -> str:
    """Return type and first sentence; PyTorch's next ones say how to open the file unsafely."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0] if lines else 'no reason given'}"


def _tensors(path: str | Path, state: Mapping) -> dict[str, Tensor]:
    strangers = [_name(key) for key, value in state.items()
                 if not (_is_text(key) and isinstance(value, Tensor))]
    if strangers or not state:
        entries = list_keys(strangers, "entries that are no named tensors")
        raise UserError(f"{path} holds no state dict" + (f"; {entries}" if strangers else ""))
    odd = [key for key, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        names = list_keys(odd, "tensors that are complex, quantised, sparse or without data")
        raise UserError(f"{path} holds no state dict of a network here; {names}")
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)
