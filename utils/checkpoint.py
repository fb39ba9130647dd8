"""Checkpoints: tensors and plain data only, written atomically, read without executing anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.download import file_digest
from utils.errors import UserError
from utils.files import atomic_write
from utils.logger import LOGGER

_FORMAT = 1
_SAFETENSORS = ".safetensors"


def save_checkpoint(path: Path, state: Mapping, previous: Path | None = None) -> None:
    """Write ``state`` (tensors, numbers, strings, lists and dicts of them) to ``path``.

    The file appears whole or not at all; a failure leaves an earlier one of that name as it was.
    ``previous``: where the earlier one is kept, as in ``atomic_write``.
    """
    with atomic_write(path, previous) as file:
        torch.save({"format": _FORMAT, **state}, file)


def load_checkpoint(path: str | Path) -> dict:
    """Read one of our checkpoints, a bare state dict such as the published files, or either of
    them as ``.safetensors``.

    Returns:
        A dict that has at least "model": the state dict, without DataParallel's ``module.``
        prefix. Ours has "config", "classes", "optimizer" and more beside it; of those, a
        ``.safetensors`` file has "config" and "classes". A file of another program that has its
        tensors in "state_dict" gives the names of what it holds beside them as "beside".

    Raises:
        UserError: no such file, not a checkpoint, a damaged one, one that would run code, or one
            whose entries are not what a checkpoint has under their names.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a checkpoint in it, such as last.pth")
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file; give the path of a checkpoint")
    state = _load_safetensors(path) if path.suffix == _SAFETENSORS else _load_torch(path)
    if isinstance(state.get("model"), Mapping):
        _check_entries(path, state)
        named = {key: value for key, value in state.items() if _is_text(key)}
        return {**named, "model": _tensors(path, state["model"])}
    # the name that training scripts of classifiers commonly use
    if isinstance(state.get("state_dict"), Mapping):
        beside = [key for key in state if _is_text(key) and key != "state_dict"]
        return {
            "model": _tensors(path, state["state_dict"]),
            **({"beside": beside} if beside else {}),
        }
    return {"model": _tensors(path, state)}


def save_safetensors(path: Path, model: Mapping[str, Tensor], about: Mapping) -> None:
    """Write a state dict as ``.safetensors``, with the values of ``about`` as JSON metadata.

    The order of the tensors, which the format does not keep, is kept in the metadata, too.

    Raises:
        UserError: the package safetensors is not installed, the file cannot be written, or the
            format has no place for a tensor or for ``about``.
    """
    _import_safetensors(path)
    from safetensors.torch import save

    about = {**about, "keys": list(model)}
    try:
        # The format takes neither strides nor tensors that share memory.
        tensors = {k: tensor.detach().cpu().contiguous().clone() for k, tensor in model.items()}
        data = save(tensors, {key: json.dumps(value) for key, value in about.items()})
    except Exception as error:  # whatever the package says of a type that it does not know
        raise UserError(
            f"{path} cannot be written: safetensors cannot hold this ({_reason(error)}); keep it "
            "as .pth"
        ) from error
    with atomic_write(path) as file:
        file.write(data)


@dataclass(frozen=True)
class BaseMatch:
    """Which tensors of a file are those of a base network, and which are not."""

    source: str
    """What the file holds, e.g. "the base of a detector"."""
    total: int
    tensors: dict[str, Tensor]
    """By key of the base network; of its shapes."""
    unused: list[str]
    """Keys of the file."""
    missing: list[str]
    """Keys of the base network, without batch counters."""
    wrong: list[str]
    """Contradictions of shape, each "key [2] instead of [64, 3, 3, 3]"."""
    fits: bool
    """Whether all that the file's kind of network has of the base is there and right."""


def match_base(
    base: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    from_classifier: Callable[[str], str | None] | None = None,
) -> BaseMatch:
    """Find a base network's tensors in a file; the better of reading it as base and as classifier.

    Args:
        base: the base network's state dict.
        state: the file's, without DataParallel's prefix: keys of the base with or without
            ``base.``, a whole detector, or a classifier.
        from_classifier: key of the classifier -> key of the base, None where it has no place
            there. Layers behind all that the classifier has may be missing: they stay new.
    """
    heads = ("loc.", "conf.", "extras.", "L2Norm.")
    detector = any(key.startswith(heads) for key in state)
    prefix = "base." if any(key.startswith("base.") for key in state) else ""
    names = {k: k.removeprefix(prefix) for k in state if k.startswith(prefix)}
    deeper = any(name not in base for name in names.values())
    source = "a classifier" if deeper else "a base network"
    if detector or len(names) < len(state):
        source = "the base of a detector"
    direct = _match(source, base, state, names)
    # A detector without a part of its base is a damaged one, not a classifier.
    if direct.fits or detector or from_classifier is None:
        return direct
    names = {key: name for key in state if (name := from_classifier(key)) is not None}
    classifier = _match("a classifier", base, state, names, from_classifier)
    return classifier if len(classifier.tensors) >= len(direct.tensors) else direct


def _match(
    source: str,
    base: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    from_classifier: Callable[[str], str | None] | None = None,
) -> BaseMatch:
    """The match by ``names``: key of the file -> key of the base."""
    found = {name: state[key] for key, name in names.items() if name in base}
    wrong = [
        f"{key} {list(found[key].shape)} instead of {list(tensor.shape)}"
        for key, tensor in base.items()
        if key in found and found[key].shape != tensor.shape
    ]
    # PyTorch before 0.4.1 did not store the batch counters, which evaluation does not need.
    missing = [k for k in base if k not in found and not k.endswith("num_batches_tracked")]
    new = set()
    if from_classifier is not None and found:
        stages = list(dict.fromkeys(key.partition(".")[0] for key in base))
        last = max(stages.index(key.partition(".")[0]) for key in found)
        # Where the classifier has the stage, too, it is not new but cut off.
        prefixes = {k.removesuffix(n) for k, n in names.items() if n in base and k.endswith(n)}
        new = {
            key
            for key in missing
            if stages.index(key.partition(".")[0]) > last
            and not any(from_classifier(prefix + key) == key for prefix in prefixes)
        }
    return BaseMatch(
        source=source,
        total=len(base),
        tensors={k: t for k, t in found.items() if t.shape == base[k].shape},
        unused=[key for key in state if names.get(key) not in base],
        missing=missing,
        wrong=wrong,
        fits=bool(found) and not wrong and new.issuperset(missing),
    )


def load_base(
    base: nn.Module,
    path: str | Path,
    from_classifier: Callable[[str], str | None] | None = None,
) -> BaseMatch:
    """Load pretrained weights into ``base``; says in the log what is unused and what stays new.

    Args:
        base: the base network.
        path: a file with keys of ``base`` (``0.conv.weight``), with or without the prefixes
            ``base.`` and ``module.``; a whole detector on this base; or a classifier.
        from_classifier: as in ``match_base``.

    Raises:
        UserError: as ``load_checkpoint``, or tensors missing or of another shape; the sentence
            lists them, and nothing is loaded.
    """
    match = match_base(base.state_dict(), load_checkpoint(path)["model"], from_classifier)
    if not match.fits:
        raise UserError(
            f"{path}: only {len(match.tensors)} of the base network's {match.total} tensors would "
            "be loaded"
            + _list("of another shape", match.wrong)
            + _list("missing", match.missing)
            + _list("unused", match.unused)
        )
    base.load_state_dict(match.tensors, strict=False)
    for what, keys in (("not used", match.unused), ("of the base network new", match.missing)):
        if keys:
            LOGGER.info("%s%s", path, _list(what, keys))
    return match


def load_weights(net: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a whole state dict into ``net``; UserError, naming ``path``, unless all of it fits.

    Batch counters, which PyTorch before 0.4.1 did not store, may be missing.
    """
    try:
        # Without the version that a state dict of PyTorch carries, it fills in the counters.
        net.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(f"{path} does not fit the network: {reasons}") from error


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    return file_digest(path, "sha256")


def rng_state() -> dict[str, Tensor | list[Tensor]]:
    """State of PyTorch's generators (data order and augmentation have their own, by seed)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: Mapping) -> None:
    """Restore ``rng_state``; CUDA states are used when there are as many devices as then."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _load_torch(path: Path) -> Mapping:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes inside the reader
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
    except Exception as error:  # as above; types that PyTorch does not have are among them
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


def _import_safetensors(path: Path):
    try:
        import safetensors
    except ImportError as error:
        raise UserError(
            f"{path} needs the package safetensors, which is not installed; pip install safetensors"
        ) from error
    return safetensors


def _check_entries(path: Path, state: Mapping) -> None:
    """UserError unless what names and describes a checkpoint's classes is of the right kinds."""
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


def _is_text(value) -> bool:
    """Whether it is a string that can be written: one without lone surrogates."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode()


def _name(key) -> str:
    if isinstance(key, str):
        return key if _is_text(key) else ascii(key)
    return str(key) if isinstance(key, int) else f"a {type(key).__name__}"


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_complex())
    )


def _reason(error: Exception) -> str:
    """Type and first sentence of an error; PyTorch's next ones say how to open the file all the
    same, which is not done here."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0] if lines else 'no reason given'}"


def _tensors(path: str | Path, state: Mapping) -> dict[str, Tensor]:
    strangers = [
        _name(key)
        for key, value in state.items()
        if not (_is_text(key) and isinstance(value, Tensor))
    ]
    if strangers or not state:
        raise UserError(
            f"{path} holds no state dict" + _list("entries that are no named tensors", strangers)
        )
    odd = [key for key, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise UserError(
            f"{path} holds no state dict of a network here"
            + _list("tensors that are complex, quantised, sparse or without data", odd)
        )
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _list(what: str, names: list[str], most: int = 20) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; {len(names)} {what}: {', '.join(names[:most])}{more}"
