"""Make a detector of some classes a detector of others: gather rows of its class heads by name."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.classes import spelled
from utils.errors import UserError
from utils.files import read_text

VOC_TO_COCO = {"aeroplane": "airplane", "motorbike": "motorcycle", "tvmonitor": "tv",
               "sofa": "couch", "diningtable": "dining table", "pottedplant": "potted plant"}
"""VOC's name of a class -> COCO's name, where they differ."""

_HEAD = re.compile(r"conf\.\d+\.(norm\.)?(weight|bias|running_mean|running_var)")


def parse_class_map(text: str) -> dict[str, str]:
    """Read a class map, "own=other,..." or the path of a file with one own=other a line.

    Return name of a class of the data -> name of a class of the detector.
    Raises UserError: an entry of another form, or two entries for one class.
    """
    entries = re.split(r"[,\n]", text)
    # A path may have an equals sign, too: runs/lr=1/map.txt.
    if "=" not in text or os.path.isfile(text):
        try:
            entries = read_text(text, "class map").splitlines()
        except UserError as error:
            raise UserError(f"the class map {text} is neither own=other,... nor a file that can be "
                            f"read ({error})") from error
    names: dict[str, str] = {}
    for entry in filter(None, (entry.strip() for entry in entries)):
        own, _, other = map(spelled, entry.partition("="))
        if not (own and other) or own in names:
            reason = "a second entry for its class" if own in names else "not of the form own=other"
            raise UserError(f"the class map {text} has {entry!r}, which is {reason}")
        names[own] = other
    return names


def match_classes(from_names: Sequence[str], to_names: Sequence[str],
                  class_map: Mapping[str, str] | None = None) -> list[int | None]:
    """Return for each of ``to_names`` the index of its class in ``from_names``, None if it is new.

    A class is found by ``class_map`` (name in ``to_names`` -> name in ``from_names``), else by its
    own name, else by the other of VOC's and COCO's names for it.
    Raises UserError: ``class_map`` has a name that is not in its list.
    """
    class_map = class_map or {}
    for own, other in class_map.items():
        for name, names in ((own, to_names), (other, from_names)):
            if name not in names:
                raise UserError(f"the class map has {own}={other}, but {name} is none of the "
                                f"classes {', '.join(names)}")
    index = {name: i for i, name in enumerate(from_names)}
    also = {**VOC_TO_COCO, **{coco: voc for voc, coco in VOC_TO_COCO.items()}}
    rows = []
    for name in to_names:
        candidates = (class_map.get(name), name, also.get(name))
        rows.append(next((index[known] for known in candidates if known in index), None))
    return rows


def check_known(path: str | Path, from_names: Sequence[str], to_names: Sequence[str],
                class_map: Mapping[str, str] | None = None) -> None:
    """Raise UserError unless the detector of ``path`` knows all classes of ``to_names``.

    The classes and ``class_map`` are those of ``match_classes``; the message names ``path``.
    """
    rows = match_classes(from_names, to_names, class_map)
    unknown = [name for name, row in zip(to_names, rows, strict=True) if row is None]
    if unknown:
        raise UserError(f"{path} has not learnt {', '.join(unknown)}; its classes are "
                        f"{', '.join(from_names)}; say which of them each is (--class_map "
                        "own=other,...), or train from it with --resume_net")


def transfer_classes(state: Mapping[str, Tensor], from_names: Sequence[str],
                     to_names: Sequence[str], class_map: Mapping[str, str] | None = None,
                     seed: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """Return a detector's state dict for other classes.

    Args:
        state: the state dict of a detector of ``from_names``: layer k of ``conf`` has the rows of
            one prior box after the other, for each background and then the classes.
        from_names: its classes, without background.
        to_names: the classes wanted, without background.
        class_map: as in ``match_classes``.
        seed: of the rows of new classes, which are initialised as PyTorch initialises
            convolutions, with bias zero, and batch norms.

    Returns a new state dict, in which all tensors but those of ``conf`` are the same objects, and
    the names of ``to_names`` whose rows are new. The rows of background are never new.
    Raises UserError: as ``match_classes``, or the heads are not those of ``from_names``.
    """
    rows = match_classes(from_names, to_names, class_map)
    index = torch.tensor([0, *(0 if row is None else row + 1 for row in rows)])
    new = torch.tensor([False, *(row is None for row in rows)])
    generator = torch.Generator().manual_seed(seed)
    result = dict(state)
    for key, tensor in state.items():
        if not _HEAD.fullmatch(key):
            continue
        count = tensor.shape[0] if tensor.dim() else 0
        boxes, rest = divmod(count, len(from_names) + 1)
        if not tensor.is_floating_point():
            raise UserError(f"{key} has whole numbers instead of weights; give another file")
        if rest or not boxes:
            raise UserError(f"{key} has {count} rows, which are not those of "
                            f"{len(from_names)} classes and background for a number of prior boxes")
        gathered = tensor.unflatten(0, (boxes, -1))[:, index]
        fresh = torch.zeros_like(gathered)
        if key.endswith(("norm.weight", "running_var")):
            fresh.fill_(1)
        elif key.endswith("weight"):
            bound = tensor[0].numel() ** -0.5
            fresh.uniform_(-bound, bound, generator=generator)
        where = new.view(1, -1, *[1] * (tensor.dim() - 1))
        result[key] = torch.where(where, fresh, gathered).flatten(0, 1)
    return result, [name for name, row in zip(to_names, rows, strict=True) if row is None]
