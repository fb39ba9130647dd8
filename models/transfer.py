"""Detectors of one set of classes as detectors of another: rows of the class heads, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

VOC_TO_COCO = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "tvmonitor": "tv",
    "sofa": "couch",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
}
"""The classes of VOC that COCO calls otherwise."""

_HEAD = re.compile(r"conf\.\d+\.(weight|bias)")


def parse_class_map(text: str) -> dict[str, str]:
    """ "own=coco,..." or the path of a file with one own=coco a line -> {own: coco}.

    Raises:
        UserError: an entry that is not of this form, or two for one name.
    """
    entries = re.split(r"[,\n]", text)
    # The path of a file can have an equals sign, too: runs/lr=1/map.txt.
    if "=" not in text or os.path.isfile(text):
        try:
            entries = Path(text).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the class map {text} is neither own=other,... nor a file that can be read "
                f"({error})"
            ) from error
    names: dict[str, str] = {}
    for entry in filter(None, (entry.strip() for entry in entries)):
        own, _, other = (part.strip() for part in entry.partition("="))
        if not (own and other) or own in names:
            reason = "a second entry for its class" if own in names else "not of the form own=other"
            raise UserError(f"the class map {text} has {entry!r}, which is {reason}")
        names[own] = other
    return names


def match_classes(
    from_names: Sequence[str], to_names: Sequence[str], class_map: Mapping[str, str] | None = None
) -> list[int | None]:
    """For each of ``to_names`` the index of its class in ``from_names``, None where it is new.

    ``class_map`` ({to: from}) decides first, then the equal name, then VOC's name for a class of
    COCO or the reverse.

    Raises:
        UserError: ``class_map`` has a name that is in neither list.
    """
    class_map = class_map or {}
    for own, other in class_map.items():
        for name, names in ((own, to_names), (other, from_names)):
            if name not in names:
                raise UserError(
                    f"the class map has {own}={other}, but {name} is none of the classes "
                    f"{', '.join(names)}"
                )
    index = {name: i for i, name in enumerate(from_names)}
    also = {**VOC_TO_COCO, **{coco: voc for voc, coco in VOC_TO_COCO.items()}}
    known = [next((n for n in (class_map.get(to), to, also.get(to)) if n in index), None)
             for to in to_names]  # fmt: skip
    return [None if name is None else index[name] for name in known]


def transfer_classes(
    state: Mapping[str, Tensor],
    from_names: Sequence[str],
    to_names: Sequence[str],
    class_map: Mapping[str, str] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """A detector's state dict for other classes.

    Args:
        state: of a detector of ``from_names``: layer k of ``conf`` has A x (1 + classes) rows, a
            prior box after the other, background first.
        from_names: its classes, without background.
        to_names: the classes wanted, without background.
        class_map: as in ``match_classes``.
        generator: for the rows of new classes (PyTorch's default initialisation of convolutions,
            bias zero); None means PyTorch's own.

    Returns:
        A new state dict, all tensors but those of ``conf`` the very same, and the names of
        ``to_names`` whose rows are new; background's never are.

    Raises:
        UserError: as ``match_classes``, or the head is not that of ``from_names``.
    """
    rows = match_classes(from_names, to_names, class_map)
    index = torch.tensor([0, *(0 if row is None else row + 1 for row in rows)])
    new = torch.tensor([False, *(row is None for row in rows)])
    result = dict(state)
    for key, tensor in state.items():
        if not _HEAD.fullmatch(key):
            continue
        boxes, rest = divmod(tensor.shape[0], len(from_names) + 1)
        if rest or not boxes:
            raise UserError(
                f"{key} has {tensor.shape[0]} rows, which are not those of {len(from_names)} "
                "classes and background for a number of prior boxes"
            )
        gathered = tensor.unflatten(0, (boxes, -1))[:, index]
        fresh = torch.zeros_like(gathered)
        if key.endswith("weight"):
            bound = tensor[0].numel() ** -0.5
            fresh.uniform_(-bound, bound, generator=generator)
        where = new.view(1, -1, *[1] * (tensor.dim() - 1))
        result[key] = torch.where(where, fresh, gathered).flatten(0, 1)
    return result, [name for name, row in zip(to_names, rows, strict=True) if row is None]
