"""Image sets by name: what --train_sets and --test_sets say, and how folders spell it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from utils.errors import UserError

SET_WORDS = ("trainval", "train", "valid", "val", "validation", "dev", "test")
"""What `set_word` gives for the folders and lists that are taken for image sets."""
DEFAULT_SET = "default"
"""The images of no other set, as CVAT names them."""
_SPELLINGS = {"training": "train", "testing": "test", "train_val": "trainval", "eval": "val",
              "evaluation": "val"}  # fmt: skip


class ImageSet(NamedTuple):
    """One image set of a data set; ``str`` gives its name on the command line.

    year: of a devkit, such as "2007"; None in a data set without years.
    name: such as "trainval".
    """

    year: str | None
    name: str

    @classmethod
    def parse(cls, text: str, existing: Collection[ImageSet] = ()) -> ImageSet:
        """Read "2007_trainval" or "trainval".

        existing: the image sets of the data set. A set whose name begins with a number, such as
        "2024_train", is taken as it is if it is among them.
        """
        year, _, name = text.partition("_")
        read = cls(year, name) if year.isdecimal() and name else cls(None, text)
        return {str(each): each for each in existing}.get(text, read)

    def __str__(self) -> str:
        return f"{self.year}_{self.name}" if self.year else self.name


def parse_image_sets(text: str, existing: Collection[ImageSet] = ()) -> list[ImageSet]:
    """Read the names of image sets, separated by commas, or by "+" as in `sets_name`.

    existing: of the data, see `ImageSet.parse`; a set whose name holds "+" is taken as it is.

    Raises:
        UserError: ``text`` names no image set, or one outside the data.
    """
    known, names = {*map(str, existing)}, [part.strip() for part in text.split(",")]
    names = [name for part in names for name in ([part] if part in known else part.split("+"))]
    sets = [ImageSet.parse(name, existing) for name in names if name]
    if not sets:
        raise UserError(f"{text!r} names no image set; give e.g. 2007_trainval,2012_trainval")
    check_sets(sets)
    return sets


def check_sets(sets: Iterable[ImageSet]) -> None:
    """Raise UserError for an image set whose name would lead files out of a run's folder."""
    for name in map(str, sets):
        outside = re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name)
        if outside or "\0" in name:
            raise UserError(f"{name!r:.80} is no image set; give a name inside the data, as train")


def set_word(name: str) -> str:
    """Return "train" for an image set of that kind: Train, training, train_images, train2017."""
    word = re.sub(r"([_-]?(images?|set))?[_-]?\d*$", "", name.lower()).replace("-", "_")
    return _SPELLINGS.get(word, word)


def is_set_name(name: str) -> bool:
    """Return whether a folder or a list is an image set by its name; train1 may be an image."""
    return set_word(name) in SET_WORDS and not name[-1:].isdigit()


def sets_name(sets: Iterable[tuple[str | None, str]]) -> str:
    """Return one name for several image sets, fit for a folder: "2007_trainval+2012_trainval"."""
    return one_folder("+".join(str(ImageSet(*each)) for each in sets))


def one_folder(name: str) -> str:
    """Return a name as that of one folder, on every system; common names stay as they are."""
    safe = re.sub(r'[/\\:*?"<>|\0-\x1f\ud800-\udc7f\udd00-\udfff]', "_", name)  # lone surrogates
    # Windows' devices; "." and ".."; names that end in dots.
    if re.match(r"(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$)", safe) or not safe.strip(". "):
        safe = f"_{safe}"
    safe = re.sub(r"[. ]$", "_", safe)
    if len(os.fsencode(safe)) > 120:  # of the 255 bytes that a file name has
        safe = f"{safe[:30]}_{hashlib.sha256(safe.encode('utf-8', 'replace')).hexdigest()[:16]}"
    return safe
