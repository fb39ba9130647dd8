"""Real images to prove an exported file with, and to calibrate INT8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
from data.image import IMAGE_SUFFIXES, read_image
from data.image_files import FileIndex
from data.image_sets import ImageSet, parse_image_sets, sets_name
from models.info import DetectorInfo
from utils.errors import UserError


@dataclass(frozen=True)
class Images:
    """Some images of a data set or a folder."""

    about: str
    """Where they lie, for people."""
    items: Sequence[int] | Sequence[Path]
    """Indices of ``dataset``; without one, files."""
    dataset: data.DetectionData | None = None
    scored: bool = False
    """Whether ``items`` are all images of ``dataset``, which has ground truth to score against."""

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> np.ndarray:
        """Return an image, BGR uint8 [H, W, 3]."""
        item = self.items[index]
        return read_image(item) if self.dataset is None else self.dataset.pull_image(item)

    def batches(self, size: int) -> Iterator[list[np.ndarray]]:
        """Yield all images, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield [self.read(i) for i in range(len(self))[start : start + size]]


@dataclass(frozen=True)
class TrainedOn:
    """Which data a checkpoint was trained and tested on, as its configuration says."""

    root: Path | None = None
    train_sets: tuple[ImageSet, ...] = ()
    test_sets: tuple[ImageSet, ...] = ()
    split: Mapping[str, object] = field(default_factory=dict)
    """Options that divide the images, see `data.split_options`."""

    @classmethod
    def of(cls, saved: Mapping, path: Path) -> TrainedOn:
        """Read the configuration of a checkpoint; empty for a file without one.

        Raises:
            UserError: the configuration is damaged.
        """
        config = saved.get("config", {})
        root, *sets = (config.get(key) for key in ("root", "train_sets", "test_sets"))
        try:
            train, test = (tuple(ImageSet(*pair) for pair in pairs or ()) for pairs in sets)
            split = {key: config[key] for key in ("val_share", "split_by") if key in config}
            return cls(_absolute(root) if root else None, train, test, split)
        except TypeError as error:
            raise UserError(f"{path}: its configuration has root {root!r} and image sets {sets},"
                            " which is not valid; give a checkpoint of this program") from error


def find_images(root: str | None, sets: str | None, limit: int, trained_on: TrainedOn,
                detector: DetectorInfo, training: bool = False) -> Images | None:
    """Find at most ``limit`` (0: all) images of a data set's image sets, or of a plain folder.

    Args:
        root: the data set or folder; None: that of ``trained_on``, if it exists, else return None.
        sets: names of image sets, separated by commas; None: those of ``trained_on`` if the root is
            its own, else the published ones.
        training: whether these are images to calibrate with: training images, not scored.

    Raises:
        UserError: ``root`` has no images, or ``sets`` are given for a plain folder.
    """
    folder = trained_on.root if root is None else _absolute(root)
    if folder is None or not folder.is_dir():
        if root is None:
            return None
        raise UserError(f"{folder} is no folder; give a folder of images or a data set")
    name, existing = detector.dataset, data.list_sets(detector.dataset, folder)
    if not existing:
        if not data.layouts(folder):
            return _in_folder(folder, sets, limit, name, training)
        name, _ = data.find_layout(folder, name)
        existing = data.list_sets(name, folder)
    if sets:
        chosen = tuple(parse_image_sets(sets, existing))
    else:
        train, test = data.default_sets(name, folder)
        if folder == trained_on.root:
            train, test = trained_on.train_sets or train, trained_on.test_sets or test
        chosen = train if training else test
    split = data.split_options(name, trained_on.split if folder == trained_on.root else {})
    dataset = data.build_dataset(name, folder, chosen, detector.classes, **split)
    about = f"{folder} {sets_name(chosen)}"
    objects = np.count_nonzero(np.diff(dataset.offsets))
    if training or not objects:
        return Images(about, _spread(range(len(dataset)), limit), dataset)
    if limit and limit < len(dataset):
        dataset.keep_first(min(limit, objects))
    dataset.check_scorable()
    return Images(about, range(len(dataset)), dataset, scored=True)


def _in_folder(folder: Path, sets: str | None, limit: int, dataset: str, training: bool) -> Images:
    files = FileIndex(IMAGE_SUFFIXES).inside(folder)
    if not files:
        raise UserError(f"{folder} holds neither images nor a data set in {dataset} layout; give"
                        " another folder")
    if sets:
        option = "--calibrate_sets" if training else "--sets"
        raise UserError(f"{folder} is a plain folder of images; leave {option} {sets} out")
    return Images(str(folder), _spread(files, limit))


def _spread(items: Sequence, limit: int) -> list:
    """Return at most ``limit`` (0: all) of the items, evenly from first to last."""
    most = min(limit or len(items), len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)]


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()
