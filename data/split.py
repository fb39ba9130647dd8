"""Image sets that no layout declares: lists in ROOT/ImageSets, and a division by file names."""

import hashlib
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data.annotation import refuse_missing
from data.image_sets import ImageSet
from utils.errors import UserError
from utils.files import read_text

SPLIT_SETS = SPLIT_TRAIN, SPLIT_VAL = "split_train", "split_val"
"""The two parts that images are divided into where nothing declares a set to test on."""
VAL_SHARE = 0.2


def check_share(value: object) -> float:
    """Return ``value``. Raises UserError if it is no number between 0 and 1."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"--val_share is {value!r}; give a number between 0 and 1, such as 0.2")
    return float(value)


def check_pattern(value: object) -> str:
    """Return ``value``. Raises UserError if it is no regular expression."""
    try:
        return re.compile(value).pattern
    except Exception as error:  # of any kind: re raises several
        raise UserError(f"--split_by is {value!r}, no regular expression ({error})") from error


def in_validation(paths: Sequence[str], val_share: float = VAL_SHARE,
                  split_by: str | None = None) -> np.ndarray:
    """Return which images belong to `SPLIT_VAL`, bool [N]; the others are `SPLIT_TRAIN`.

    The division depends on the file names alone, not on their order. Images of one group stay
    together. Groups are taken in the order of their keys' sha256 until they hold the share.

    Args:
        paths: of the images, relative to the root.
        val_share: smallest share of `SPLIT_VAL`.
        split_by: regular expression that gives an image's group: its first parenthesis, or all of
            the match, at the start of the file name, else anywhere in the path. Without one, or
            without a match, the group is the file name without suffix.

    Raises:
        UserError: a wrong value, or all images are one group.
    """
    share, pattern = check_share(val_share), check_pattern(split_by or "")
    keys = [_group(path, pattern) for path in paths]
    counts = Counter(keys)
    if len(counts) < 2:
        cannot = "cannot be divided into training and test images"
        if len(keys) < 2:
            raise UserError(f"{'one image' if keys else 'no image'} {cannot}; add images")
        raise UserError(f"{len(keys)} images in one group ({', '.join(counts)}) {cannot}; give "
                        f"{'another ' * bool(pattern)}--split_by, or declare image sets "
                        "(docs/own_data.md)")
    order = sorted(counts, key=lambda key: hashlib.sha256(key.encode("utf-8", "replace")).digest())
    before = np.cumsum([0, *(counts[key] for key in order)])
    chosen = {key for key, taken in zip(order[:-1], before, strict=False)
              if taken < share * len(keys)}
    return np.array([key in chosen for key in keys])


def _group(path: str, pattern: str) -> str:
    path = _clean(path)
    name = posixpath.basename(path)
    match = pattern and (re.match(pattern, name) or re.search(pattern, path))
    if match and (key := match[1 if match.re.groups else 0]):
        return key
    return posixpath.splitext(name)[0]


def _clean(path: str) -> str:
    """Return a path with slashes, in NFC and without ``.`` in it."""
    return posixpath.normpath(unicodedata.normalize("NFC", path.replace("\\", "/")))


def list_files(root: str | Path) -> dict[str, Path]:
    """Return the lists ROOT/ImageSets/NAME.txt and ROOT/ImageSets/Main/NAME.txt by NAME."""
    folder = Path(os.path.expanduser(root), "ImageSets")
    if not os.path.isdir(folder):
        return {}
    files = [*sorted(folder.glob("[!.]*.txt")), *sorted(folder.glob("Main/[!.]*.txt"))]
    return {file.stem: file for file in files}


def read_list(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file and line number, line) of a list, empty lines left out.

    Raises:
        UserError: the file cannot be read, or is no UTF-8 text.
    """
    for number, line in enumerate(read_text(path, "image set").splitlines(), 1):
        if line := line.strip():
            yield f"{path}:{number}", line


def listed(path: Path, names: Sequence[str]) -> list[int]:
    """Return the positions in ``names`` of the images in a list, each once, in its order.

    A line is the path of an image or the end of it, with or without suffix. Folders that the path
    does not have, of another machine or of a tool, are ignored.

    Args:
        names: paths of all images relative to the root, with slashes.

    Raises:
        UserError: the list is empty, or a line fits no image or several.
    """
    index: dict[str, list[int]] = {}
    cleaned = [*map(_clean, names)]
    for i, name in enumerate(cleaned):
        for key in chain(*map(ends, {name, posixpath.splitext(name)[0]})):
            index.setdefault(key, []).append(i)
    found: dict[int, None] = {}
    missing = []
    for where, line in read_list(path):
        wanted = _clean(line)
        hits = next((index[key] for key in ends(wanted) if key in index), [])
        whole = [i for i in hits if wanted in (cleaned[i], posixpath.splitext(cleaned[i])[0])]
        if len(hits := whole or hits) > 1:
            several = " and ".join(names[i] for i in hits[:2])
            raise UserError(f'{where}: "{line}" fits {several}; write the whole path')
        found.update(dict.fromkeys(hits))
        missing += [] if hits else [f'"{line}" ({where})']
    refuse_missing(path, missing)
    if not found:
        raise UserError(f"{path}: the image set lists no image")
    return list(found)


def ends(path: str) -> Iterator[str]:
    """Yield a path, then what is left of it after each of its folders."""
    parts = path.lstrip("/").split("/")
    for start in range(len(parts)):
        yield "/".join(parts[start:])


def choose(root: Path, image_set: ImageSet, names: Sequence[str],
           declared: Mapping[str, Collection[int]], val_share: float,
           split_by: str | None) -> list[int]:
    """Return the positions in ``names`` of an image set: a list's, a declared one's, or a part.

    Args:
        names: paths of all images, relative to the root.
        declared: name -> positions of the image sets that the layout itself declares.
        val_share, split_by: see `in_validation`, which divides the images of all declared sets, or
            all images if there are none.

    Raises:
        UserError: no such image set.
    """
    lists = list_files(root)
    if (name := str(image_set)) in lists:
        return listed(lists[name], names)
    if name in declared:
        return list(declared[name])
    if name in SPLIT_SETS:
        other = SPLIT_SETS[1 - SPLIT_SETS.index(name)]
        sets = [*declared.values(),
                *(listed(path, names) for key, path in lists.items() if key not in SPLIT_SETS)]
        pool = sorted({i for each in sets for i in each}) or range(len(names))
        if other in lists:  # this part is the rest
            if rest := sorted({*pool} - {*listed(lists[other], names)}):
                return rest
            raise UserError(f"{lists[other]} leaves no image for {name}; take some out of it")
        chosen = in_validation([names[i] for i in pool], val_share, split_by)
        return [i for i, val in zip(pool, chosen, strict=True) if val == (name == SPLIT_VAL)]
    existing = ", ".join([*declared, *lists]) or "none"
    raise UserError(f'no image set "{name}" in {root}; existing image sets: {existing}; write '
                    f"{root / 'ImageSets' / name}.txt, one image a line, or leave the option out")
