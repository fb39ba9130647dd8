"""Rules of options whose values are more than a word or a number: each returns the value to keep.

Raises:
    UserError, or ArgumentTypeError from ``parts``: the value breaks the rule.
"""

import argparse
import re

from data.classes import check_classes
from data.config import PRIORS
from data.image_sets import ImageSet, check_sets
from utils.errors import UserError
from utils.trackers import TRACKERS


def names(value: object) -> tuple[str, ...]:
    """Check class names."""
    are_names = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    if not are_names or not value:
        raise UserError(f"classes are {value!r:.80}; give a list of names")
    return check_classes(value, "the configuration")


def sets(value: object) -> tuple[ImageSet, ...]:
    """Check image sets, (year or None, name) each."""

    def fits(item: object) -> bool:
        pair = isinstance(item, list | tuple) and len(item) == 2
        return pair and isinstance(item[0], str | None) and isinstance(item[1], str)

    if not (isinstance(value, list | tuple) and all(map(fits, value))):
        raise UserError(f"image sets are {value!r:.80}; give a list of [year or null, name]")
    found = tuple(ImageSet(*item) for item in value)
    check_sets(found)
    return found


def names_priors(value: object) -> bool:
    """Return whether a value names prior boxes: VOC, COCO, fit, or the text of their sizes."""
    names = {name for name, _ in PRIORS} | {"fit"}
    return isinstance(value, str) and (value in names or bool(re.fullmatch(r"[\d.,+]+", value)))


def priors(value: object) -> str:
    """Check prior boxes, by name or sizes."""
    if not names_priors(value):
        raise UserError(f"--priors is {value!r:.80}; give VOC, COCO, fit, or a file of sizes")
    return value


def tracker_names(text: str) -> str:
    """Read the value of --log: names separated by commas; "" names none."""
    if wrong := [name for name in text.split(",") if text and name not in TRACKERS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(TRACKERS)}")
    return text


def parts(text: str) -> str:
    """Read the value of --freeze; "" freezes nothing."""
    if not re.fullmatch(r"|base|base:[1-9]\d{0,3}|heads", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of base, base:K (K layers) and heads")
    return text
