"""Class names: what is valid, and how the command line and files give them."""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence

from utils.errors import UserError
from utils.files import read_text

BACKGROUND = frozenset({"background", "__background__"})


def is_background(name: str) -> bool:
    """Return whether a class without objects may be the background: Background, _background_."""
    return name.strip("_").lower() == "background"


def spelled(name: str) -> str:
    """Return a class name in the form in which names are compared: NFC, without spaces around it.

    Programs write "é" as one character or as two; NFC has one.
    """
    return unicodedata.normalize("NFC", name.strip())


def check_classes(classes: Sequence[str], source: str) -> tuple[str, ...]:
    """Return class names as a tuple, as `spelled`.

    Raises UserError if one is empty, repeated, background, or cannot be written to a file.
    """
    names = tuple(map(spelled, classes))
    if not names or "" in names:
        raise UserError(f"{source}: a class name is empty")
    if unfit := [name for name in names
                 if any(unicodedata.category(each) in ("Cc", "Cs") for each in name)]:
        raise UserError(f"{source}: the class name {unfit[0]!a:.80} has a control character or half"
                        " of a surrogate pair; rename the class")
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{source}: class names must be unique, repeated: {', '.join(repeated)}")
    if background := set(names) & BACKGROUND:
        raise UserError(f'{source}: leave "{background.pop()}" out; the background is not a class '
                        'of the data')
    return names


def parse_classes(text: str) -> tuple[str, ...]:
    """Read the value of --classes: "a,b,c", or a file with one name a line.

    Empty lines are left out.
    """
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        lines = read_text(path, "class names").splitlines()
        return check_classes([line for line in lines if line.strip()], path)
    return check_classes(text.split(","), "--classes")
