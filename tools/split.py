"""Divide the images of a data set into training and test images, and write the lists."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data import build_dataset, default_sets, split_options
from data.image_sets import ImageSet
from data.split import SPLIT_SETS
from engine.options import add_option
from engine.resolve import resolve
from utils.arguments import Parser
from utils.errors import UserError, command
from utils.files import atomic_write


def parse(argv: Sequence[str] | None) -> dict:
    """Return the given options by name."""
    p = Parser(
        prog="python -m tools.split", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Divide the images under --root as train_test.py does where nothing declares a "
        "set to test on. Write ROOT/ImageSets/split_train.txt and split_val.txt, which decide from "
        "then on, and may be edited.",
    )
    for name in ("dataset", "root", "classes", "val_share", "split_by"):
        add_option(p, name)
    return vars(p.parse_args(argv))


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = resolve(parse(argv))
    folder = Path(options.root) / "ImageSets"
    paths = [folder / f"{name}.txt" for name in SPLIT_SETS]
    if old := [path for path in paths if path.exists()]:
        raise UserError(f"{old[0]} is there already and decides; delete it to divide again")
    more = split_options(options.dataset, vars(options))
    sets = [[ImageSet(None, name)] for name in SPLIT_SETS]
    parts = [build_dataset(options.dataset, options.root, each, options.classes, **more)
             for each in sets]
    try:
        for path, part in zip(paths, parts, strict=True):
            lines = [id if isinstance(id, str) else
                     os.path.relpath(part.image_path(i), options.root)
                     for i, id in enumerate(part.ids)]
            with atomic_write(path) as file:
                file.write("".join(f"{Path(line).as_posix()}\n" for line in lines).encode())
    except BaseException:
        for path in paths:  # one list alone would decide, too
            path.unlink(missing_ok=True)
        raise
    for path, part in zip(paths, parts, strict=True):
        print(f"{path}: {part.describe()}")
    if default_sets(options.dataset, options.root)[0] != tuple(sets[0]):
        print(f"--train_sets {SPLIT_SETS[0]} --test_sets {SPLIT_SETS[1]} takes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
