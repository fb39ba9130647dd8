"""Checkpoints: tensors and plain data only, written atomically, read without executing anything."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.errors import UserError, import_package
from utils.files import INFLATED, atomic_write, check_archive, file_digest

T = TypeVar("T")

_FORMAT = 1
_SAFETENSORS = ".safetensors"
_NESTED = ("model", "state_dict", "model_state_dict", "net")
"""Names under which programs keep a state dict."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and a wrapper's member put before every key."""


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
        A dict with at least "model": the state dict, without the prefixes ``module.``,
        ``_orig_mod.`` and ``model.``. A checkpoint of this program has more: "config", "classes",
        "optimizer" and others; a ``.safetensors`` file keeps "config" and "classes". If another
        program has put the state dict under a name, "beside" has the names of its other entries.

    Raises:
        UserError: the file does not exist, is damaged, is no checkpoint, would run code, or has
            entries that are not what a checkpoint has under their names.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give a checkpoint in it, such as best.pth")
    if not os.path.isfile(path):  # path.is_file() fails for some names
        raise UserError(f"{path} does not exist or is not a file; give the path of a checkpoint")
    named = path.suffix.lower() == _SAFETENSORS
    state = _load_safetensors(path) if named else _load_torch(path, mmap)
    inner, beside = _innermost(state)
    model = _tensors(path, inner)
    if isinstance(state.get("model"), Mapping):
        _check_entries(path, state)
        return {**{key: value for key, value in state.items() if _is_text(key)}, "model": model}
    return {"model": model, "beside": beside} if beside else {"model": model}


def save_safetensors(path: Path, model: Mapping[str, Tensor], about: Mapping) -> None:
    """Write a state dict as ``.safetensors``, with the values of ``about`` as JSON metadata.

    The format does not keep the order of tensors; the metadata keep it.

    Raises:
        UserError: the package safetensors is not installed, the file cannot be written, or the
            format cannot hold a tensor or a value of ``about``.
    """
    safetensors = import_package("safetensors.torch", path)
    about = {**about, "keys": list(model)}
    try:
        # The format has neither strides nor tensors that share memory.
        tensors = {k: tensor.detach().cpu().contiguous().clone() for k, tensor in model.items()}
        data = safetensors.save(tensors, {key: json.dumps(value) for key, value in about.items()})
    except Exception as error:  # the package raises various types
        raise UserError(f"{path} cannot be written: safetensors cannot hold this "
                        f"({_reason(error)}); keep it as .pth") from error
    with atomic_write(path) as file:
        file.write(data)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a whole state dict into ``net``; UserError, naming ``path``, unless all of it fits.

    What is not finite does not fit. Batch counters may be missing: PyTorch before 0.4.1 did not
    store them.
    """
    expected = net.state_dict()
    whole = [key for key, tensor in expected.items() if key in state
             and tensor.is_floating_point() and not state[key].is_floating_point()]
    if whole:
        names = list_keys(whole, "tensors of whole numbers instead of weights")
        raise UserError(f"{path} does not fit the network: {names}")
    try:
        # PyTorch fills in missing counters only if the state dict has no version, as a plain dict.
        net.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(f"{path} does not fit the network: {reasons}") from error
    if broken := [key for key, tensor in expected.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} holds {list_keys(broken, 'tensors that are not finite')}; its "
                        "weights have diverged, or it is damaged: give an earlier checkpoint")


def sha256_of(path: str | Path) -> str:
    """Return the hex SHA-256 of a file."""
    return file_digest(path, "sha256")


def read_hashed(path: str | Path, read: Callable[[str | Path], T]) -> tuple[T, str]:
    """Return ``read(path)``, and the hex SHA-256 of the file that it read.

    A file that is replaced meanwhile, as a training replaces last.pth, is read again.
    """
    while True:
        before = sha256_of(path) if os.path.isfile(path) else ""
        found = read(path)
        if not os.path.isfile(path):  # between the two renames of a training that saves
            continue
        if (digest := sha256_of(path)) == before:
            return found, digest


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
        if not mmap:
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        # PyTorch's own text says how to open the file unsafely.
        reason = _reason(error.__context__ or error)
        raise UserError(f"{path} is damaged, is not a PyTorch file of a state dict, or holds more "
                        f"than tensors and plain data, which could run code ({reason}); get it "
                        "anew, or save model.state_dict() and plain values such as float(x)"
                        ) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _innermost(state: Mapping) -> tuple[Mapping, list[str]]:
    """Return the state dict in a file's dicts, and the names of the other entries around it."""
    beside: list[str] = []
    for _ in range(8):  # a dict may hold itself
        key = next((key for key in _NESTED if isinstance(state.get(key), Mapping)), None)
        if key is None:
            break
        beside += [name for name in state if _is_text(name) and name != key]
        state = state[key]
    return state, beside


def _load_safetensors(path: Path) -> dict:
    safetensors = import_package("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # as above, and for dtypes that PyTorch does not have
        raise UserError(f"{path} is damaged, or is not a safetensors file that can be read "
                        f"({_reason(error)})") from error
    try:
        about = {k: json.loads(about[k]) for k in ("config", "classes", "keys") if k in about}
    except (ValueError, RecursionError) as error:  # RecursionError: JSON as deep as that
        reason = _reason(error)
        raise UserError(f"{path}: its metadata are none of this program ({reason})") from error
    keys = about.pop("keys", None)
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if named and len(keys) == len(tensors) and tensors.keys() == set(keys):
        tensors = {key: tensors[key] for key in keys}
    return {**about, "model": tensors}


def _check_entries(path: Path, state: Mapping) -> None:
    found = state.get("format", _FORMAT)
    if not (isinstance(found, int) and found == _FORMAT):
        kind = repr(found) if isinstance(found, (int, str)) else f"a {type(found).__name__}"
        raise UserError(f"{path} has checkpoint format {kind}, this code reads {_FORMAT}; update "
                        "the code")
    classes = state.get("classes", [])
    if not (isinstance(classes, list | tuple) and all(map(_is_text, classes))):
        raise UserError(f'{path} has "classes" that are not a list of names; it is no checkpoint')
    config = state.get("config", {})
    odd = odd_part(config) if isinstance(config, Mapping) else f"a {type(config).__name__}"
    if odd:
        raise UserError(f"{path} has a configuration that is not plain data by name (it holds "
                        f"{odd}); it is no checkpoint")


def is_number(value: object, most: float = 1 << 62) -> bool:
    """Return whether a foreign value is a number from 0 to ``most``, and no boolean."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and 0 <= value <= most


def odd_part(value: object, most: int = 100_000) -> str:
    """Return what in a value is not plain data, as JSON has them: "" for nothing.

    At most ``most`` values are looked at: lists that hold one list many times have no end.
    """
    todo = [value]
    for _ in range(most):
        if not todo:
            return ""
        value = todo.pop()
        if isinstance(value, Mapping | list | tuple):
            if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
                return "a key that is no text"
            todo += value.values() if isinstance(value, Mapping) else value
            if len(todo) > most:
                break
        elif not isinstance(value, str | int | float | None):
            return f"a {type(value).__name__}"
        elif isinstance(value, str) and "\0" in value:
            return "a text with NUL"
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            return "a number of more than 64 bits"
    return f"more than {most} values"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return False
    # A tensor may repeat a few stored numbers to any size.
    stored = max(tensor.untyped_storage().nbytes(), INFLATED)
    whole = tensor.numel() * tensor.element_size() <= stored
    return whole and not (tensor.is_quantized or tensor.is_complex())


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0] if lines else 'no reason given'}"


def _tensors(path: str | Path, state: Mapping) -> dict[str, Tensor]:
    strangers = [key if _is_text(key) else f"{key!a:.40}" if isinstance(key, int | str) else
                 f"a {type(key).__name__}" for key, value in state.items()
                 if not (_is_text(key) and isinstance(value, Tensor))]
    if strangers or not state:
        entries = list_keys(strangers, "entries that are no named tensors")
        raise UserError(f"{path} holds no state dict" + (f"; {entries}" if strangers else ""))
    odd = [key for key, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        kinds = "tensors that are complex, quantised, sparse, repeated or without data"
        names = list_keys(odd, kinds)
        raise UserError(f"{path} holds no state dict of a network here; {names}")
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
