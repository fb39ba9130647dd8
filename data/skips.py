"""Records of what a data set's reader changed or left out."""

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class SkipKind(Enum):
    """Kinds of records that a reader changes or leaves out.

    text: a description for the log. level: "note" where training loses nothing that was asked for,
    else "warning". A warning about a box means that the box is dropped.
    """

    OTHER_SET_UNREAD = ("file of another image set, unread for its class names", "warning")
    SEVERAL_IMAGES = ("image of the same name as others, taken for its suffix", "warning")
    IMAGE_EMPTIED = ("image that lost all its boxes", "warning")
    CLASS_EMPTIED = ("class that lost all its boxes", "warning")
    IMAGE_LISTED_TWICE = ("image listed twice, read once", "warning")
    UNKNOWN_CLASS = ("object of an unknown class, dropped", "warning")
    CLASSES_LEFT_OUT = ("image set read without some of its classes", "warning")
    SIZE_SWAPPED = ("<size> with width and height swapped", "warning")
    CATEGORY_SURPLUS = ("category without a box, a root or a duplicate, left out", "note")
    BOX_FORMAT = ("image set whose boxes look like x1, y1, x2, y2, not x, y, w, h", "warning")
    BOX_IN_SHARES = ("box in shares of the image instead of pixels, dropped", "warning")
    BOX_WITHOUT_AREA = ("box without area, dropped", "warning")
    BOX_OUTSIDE = ("box outside the image, dropped", "warning")
    BOX_CLIPPED = ("box clipped to the image", "note")
    CROWD = ("crowd, left out", "note")
    NO_ANNOTATION_FILE = ("image without an annotation file, left out", "warning")
    NO_LABEL_FILE = ("image without a label file, read as background", "warning")
    VALUE_OUTSIDE = ("label with a value outside 0 to 1, clipped", "warning")
    LABEL_WITHOUT_IMAGE = ("label file without its image, left out", "warning")
    SET_ABSENT = ("image set that is declared but has no files, left out", "warning")
    SET_UNANNOTATED = ("folder of an image set with images but no annotations, not used", "warning")
    OTHER_SHAPE = ("shape that is no box and has no area, left out", "warning")
    OUTSIDE_ROOT = ("image outside the folder of the data", "warning")
    EMPTY_IN_CVAT = ("image without an annotation file, background in CVAT's exports", "note")
    OTHER_FOLDER = ("image set with its images in another folder", "note")

    def __init__(self, text: str, level: str) -> None:
        self.text = text
        self.level = level


class Skip(NamedTuple):
    """One record that a reader changed or left out.

    image: index in the data set; None where the record is about no single image.
    box: (x1, y1, x2, y2) in pixels as annotated, counted from 0; None where it is about no box.
    detail: the file, the object and the value, for a person.
    """

    kind: SkipKind
    image: int | None
    box: tuple[float, float, float, float] | None
    detail: str


def report_lines(skipped: Iterable[Skip]) -> list[str]:
    """Return a line for the log for each kind: its count and its first record."""
    details: dict[SkipKind, list[str]] = {}
    for skip in skipped:
        details.setdefault(skip.kind, []).append(skip.detail)
    return [f"{kind.text}: {len(found)}, e.g. {found[0]}" for kind, found in details.items()]
