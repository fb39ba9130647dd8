"""What a training would see, before it: faults of the data, and how well the prior boxes fit them.

    python -m tools.check --root FOLDER -d VOC|COCO [--train_sets SETS] [--test_sets SETS]
        [--classes NAMES] [--size 300 512] [--priors VOC|COCO] [--json OUT] [--html OUT] [--strict]

An error is what a training stops at (a missing, damaged or wrongly sized picture, a malformed
annotation) or what makes its score worthless (a test picture that is a training picture). A warning
is what it would silently do without: boxes that the reader drops, near copies of pictures, boxes
that hardly any prior box fits. Exit status: 0 no errors, 1 errors (with --strict: or warnings),
2 bad usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from data import DATASETS, DetectionData, build_dataset
from data.config import PRIORS, PriorConfig
from data.image import read_image
from data.image_sets import sets_name
from data.skips import SkipKind
from engine.options import Options
from utils.arguments import positive
from utils.errors import UserError, command
from utils.files import atomic_write, check_writable, write_json
from utils.logger import LOGGER

PARTS = {"train": "train_sets", "test": "test_sets"}
LEVELS = ("error", "warning", "note")
MATCHED = Options.jaccard_threshold
LOW_SHARE = 0.9
"""A class fits if this share of its boxes reaches the IoU `MATCHED` with some prior box."""

THUMBNAIL, COARSE = 32, 16
# Of grey pictures of 32 x 32, in standard deviations of a picture. Recompressed, resized or evenly
# brightened copies differ by 0.01 to 0.2 (root mean square), different photographs of blood cells,
# of COCO and drawn ones by 0.5 at least; one object that is elsewhere shows in the maximum.
NEAR_COARSE, NEAR_RMS, NEAR_MAX = 0.2, 0.25, 1.5
PRODUCTS = 2**24  # computed at once: 64 MB, whatever the number of pictures
PLAIN = 2.0  # grey levels: a picture with a smaller standard deviation has nothing to compare


# ---------------------------------------------------------------- findings


@dataclass(frozen=True)
class Record:
    """One thing found; `pictures` are (part, index) pairs, `box` (pixels) lies in the first."""

    text: str
    pictures: tuple[tuple[str, int], ...] = ()
    box: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Finding:
    """Things of one kind. level: one of `LEVELS`; part: "train", "test" or "" for both."""

    level: str
    part: str
    what: str
    records: list[Record]


@dataclass
class Report:
    """All that `check` found.

    parts: name -> data set, without one that could not be opened. classes: name -> part ->
    (boxes, pictures with one). fits: a dict each of class, size and prior boxes. advice: lines.
    """

    options: dict
    sizes: Sequence[int]
    parts: dict[str, DetectionData] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    classes: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    fits: list[dict] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, level: str, part: str, what: str, records: Iterable[Record]) -> None:
        if records := list(records):
            self.findings.append(Finding(level, part, what, records))

    def count(self, level: str) -> int:
        return sum(len(f.records) for f in self.findings if f.level == level)

    def by_level(self) -> list[Finding]:
        return sorted(self.findings, key=lambda f: LEVELS.index(f.level))


def check(
    options: dict,
    sizes: Sequence[int] = (300, 512),
    workers: int = 8,
    progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Report:
    """Look at everything that a training with these options would read.

    Args:
        options: "dataset", "root", "train_sets", "test_sets", "priors" and maybe "classes", as
            `train_test.resolve` makes them.
        sizes: of the network's input, for the fit of the prior boxes.
        workers: threads that read pictures (OpenCV decodes without Python's lock).
        progress: called as progress(part, pictures done, pictures in all).

    Raises:
        UserError: there is no folder "root".
    """
    if not Path(options["root"]).is_dir():
        raise UserError(f"{options['root']}: no such data set folder; give its place with --root")
    report = Report(options, sizes)
    classes, looks = options.get("classes"), {}
    for part, key in PARTS.items():
        faults: list[str] = []
        try:
            dataset = build_dataset(
                options["dataset"], options["root"], options[key], classes, faults=faults
            )
        except UserError as error:
            report.add("error", part, "image set that cannot be opened", [Record(str(error))])
            continue
        classes = classes or list(dataset.classes) or None
        report.parts[part] = dataset
        looks[part] = look = Look.at(dataset, workers, lambda *n, p=part: progress(p, *n))
        seen = {text: ((part, i),) for i, text in look.faults.items()}
        texts = dict.fromkeys([*faults, *look.faults.values()])
        refused = [Record(text, seen.get(text, ())) for text in texts]
        report.add("error", part, "record that a training stops at", refused)
        _check_reading(report, part, dataset, look)
        _check_boxes(report, part, dataset)
    if "test" in report.parts:
        try:
            report.parts["test"].check_scorable()
        except UserError as error:
            report.add("error", "test", "image sets that cannot be scored", [Record(str(error))])
    _check_classes(report)
    _check_copies(report, looks)
    _check_priors(report)
    return report


# ---------------------------------------------------------------- pictures


@dataclass
class Look:
    """What reading every picture of a data set showed, a picture each.

    faults: index -> why a training would stop at it. digests: of the pixels, None if unreadable.
    thumbnails: uint8 [N, 32, 32], grey. turned: index -> what an EXIF orientation leaves open.
    """

    faults: dict[int, str]
    digests: list[bytes | None]
    thumbnails: np.ndarray
    turned: dict[int, str]

    @classmethod
    def at(cls, dataset, workers: int, progress: Callable[[int, int], None]) -> Look:
        n = len(dataset)
        look = cls({}, [None] * n, np.zeros((n, THUMBNAIL, THUMBNAIL), np.uint8), {})
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, n, 256):  # so that few wait when it is interrupted
                part = range(start, min(start + 256, n))
                found = pool.map(lambda i: _look_at(dataset, i), part)
                for i, (fault, turned, digest, thumbnail) in zip(part, found, strict=True):
                    if fault:
                        look.faults[i] = fault
                    if turned:
                        look.turned[i] = turned
                    if digest:
                        look.digests[i], look.thumbnails[i] = digest, thumbnail
                progress(part.stop, n)
        return look

    def originals(self) -> np.ndarray:
        """The first picture of every digest that can be compared: int64 indices."""
        first: dict[bytes, int] = {}
        for i, digest in enumerate(self.digests):
            if digest:
                first.setdefault(digest, i)
        indices = np.array(list(first.values()), np.int64)
        plain = np.array([self.thumbnails[i].std() < PLAIN for i in indices], bool)
        return indices[~plain]


def _read(dataset, i: int) -> tuple[np.ndarray | None, str | None]:
    """(the picture, why a training would stop at it); the picture may be readable all the same."""
    try:
        return dataset.pull_image(i), None
    except UserError as error:
        fault = str(error)
    try:
        return read_image(dataset.image_path(i)), fault
    except UserError:
        return None, fault


def _look_at(dataset, i: int) -> tuple[str | None, str | None, bytes | None, np.ndarray | None]:
    """(fault, what its EXIF orientation leaves open, digest of the pixels, thumbnail)."""
    image, fault = _read(dataset, i)
    if image is None:
        return fault, None, None, None
    turned = None if fault else _turned(dataset.image_path(i), image)
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).ravel())
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    side = (THUMBNAIL, THUMBNAIL)
    return fault, turned, digest.digest(), cv2.resize(grey, side, interpolation=cv2.INTER_AREA)


def _turned(path: Path, image: np.ndarray) -> str | None:
    with open(path, "rb") as file:
        if b"exif" not in file.read(1 << 16).lower():
            return None
    upright, stored = read_image(path), read_image(path, orient=False)
    if upright.shape != stored.shape:  # the sizes tell which one was annotated, and it is read
        return "read as stored, lying" if image.shape == stored.shape else None
    if np.array_equal(upright, stored):
        return None
    return "no size tells whether the boxes are for the picture before or after it"


def _check_reading(report: Report, part: str, dataset, look: Look) -> None:
    turned = defaultdict(list)
    for i, what in look.turned.items():
        turned[what].append(Record(str(dataset.image_path(i)), ((part, i),)))
    for what, records in turned.items():
        level = "note" if what.startswith("read as stored") else "warning"
        report.add(level, part, f"picture that an EXIF orientation turns: {what}", records)
    for kind in dict.fromkeys(skip.kind for skip in dataset.skipped):
        # A test set with other classes than the training's loses boxes; --classes asks for it.
        asked = kind is SkipKind.CLASSES_LEFT_OUT and report.options.get("classes")
        records = [
            Record(skip.detail, () if skip.image is None else ((part, skip.image),), skip.box)
            for skip in dataset.skipped
            if skip.kind is kind
        ]
        report.add("note" if asked else kind.level, part, kind.text, records)


# ---------------------------------------------------------------- copies


def _check_copies(report: Report, looks: dict[str, Look]) -> None:
    def record(sign: str, *pictures: tuple[str, int]) -> Record:
        paths = (str(report.parts[part].image_path(i)) for part, i in pictures)
        return Record(f" {sign} ".join(paths), pictures)

    originals = {part: look.originals() for part, look in looks.items()}
    for part, look in looks.items():
        first: dict[bytes, int] = {}
        same = [
            record("=", (part, i), (part, j))
            for i, digest in enumerate(look.digests)
            if digest and (j := first.setdefault(digest, i)) != i
        ]
        report.add("warning", part, "picture that is there twice", same)
        own = look.thumbnails[originals[part]]
        near = [
            record("~", *((part, int(originals[part][k])) for k in pair))
            for pair in near_pairs(own, own, earlier=True)
        ]
        report.add("warning", part, "picture that is nearly another one", near)
    if len(looks) < 2:
        return
    train, test = looks["train"], looks["test"]
    known = {digest: j for j, digest in reversed([*enumerate(train.digests)]) if digest}
    shared = [
        record("=", ("test", i), ("train", known[digest]))
        for i, digest in enumerate(test.digests)
        if digest in known
    ]
    report.add("error", "", "test picture that is trained on", shared)
    new = np.array([i for i in originals["test"] if test.digests[i] not in known], np.int64)
    pairs = near_pairs(test.thumbnails[new], train.thumbnails[originals["train"]])
    near = [
        record("~", ("test", int(new[i])), ("train", int(originals["train"][j]))) for i, j in pairs
    ]
    report.add("warning", "", "test picture that is nearly a training picture", near)


def near_pairs(
    queries: np.ndarray, keys: np.ndarray, earlier: bool = False
) -> Iterator[tuple[int, int]]:
    """Yield (query, key) for every query that is a near copy of a key: of those the nearest.

    Near copies differ by at most `NEAR_COARSE` at 16 x 16 (root mean square), and by at most
    `NEAR_RMS` and `NEAR_MAX` at 32 x 32. The nearest key has the least difference at 16 x 16.

    Args:
        queries: uint8 [n, 32, 32], grey.
        keys: uint8 [m, 32, 32], grey.
        earlier: compare query i with the keys before i alone, to find copies within one array.
    """
    if not len(queries) or not len(keys):
        return
    a, b = _coarse(queries), _coarse(keys)
    squares = (b**2).sum(1)
    rows = 1 + PRODUCTS // len(keys)
    for start in range(0, len(a), rows):
        products = a[start : start + rows] @ (b[: start + rows] if earlier else b).T
        for i, row in enumerate(products, start):
            end = i if earlier else len(b)
            distances = squares[:end] + a[i] @ a[i] - 2 * row[:end]
            near = np.flatnonzero(distances <= NEAR_COARSE**2 * COARSE**2)
            near = near[np.argsort(distances[near], kind="stable")]
            if (key := _first_copy(queries[i], keys, near)) is not None:
                yield i, key


def _coarse(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails at 16 x 16, normalised: float32 [n, 256]."""
    cells = thumbnails.reshape(len(thumbnails), COARSE, 2, COARSE, 2)
    return _normalised(cells.mean((2, 4), dtype=np.float32))


def _first_copy(query: np.ndarray, keys: np.ndarray, candidates: np.ndarray) -> int | None:
    """Return the first of the candidates, indices of keys, that is a near copy at 32 x 32."""
    query = _normalised(query[None])
    for start in range(0, len(candidates), 64):
        few = candidates[start : start + 64]
        apart = np.abs(_normalised(keys[few]) - query)
        copies = ((apart**2).mean(1) <= NEAR_RMS**2) & (apart.max(1) <= NEAR_MAX)
        if copies.any():
            return int(few[copies.argmax()])
    return None


def _normalised(pictures: np.ndarray) -> np.ndarray:
    """float32 [n, pixels] of the mean 0 and the standard deviation 1, less for faint pictures."""
    pixels = pictures.reshape(len(pictures), -1).astype(np.float32)
    pixels -= pixels.mean(1, keepdims=True)
    return pixels / np.maximum(pixels.std(1, keepdims=True), 2 * PLAIN)


# ---------------------------------------------------------------- boxes and classes


def _check_boxes(report: Report, part: str, dataset) -> None:
    tiny, without = [], 0
    for i in range(len(dataset)):
        target, size = dataset.target(i), dataset.image_size(i)
        without += not len(target)
        sides = target[:, 2:4] - target[:, :2]  # the rule is that of SSDAugmentation
        for k in np.flatnonzero((100 * sides < size).any(1)):
            x1, y1, x2, y2 = target[k, :4].tolist()
            name = dataset.classes[int(target[k, 4]) - 1]
            text = f"{dataset.image_path(i)}: {name}, {x2 - x1:.4g} x {y2 - y1:.4g}"
            tiny.append(Record(f"{text} in {size[0]} x {size[1]}", ((part, i),), (x1, y1, x2, y2)))
    if part == "train":  # a test drops nothing
        what = "tiny box, a side under 1 % of the picture's (dropped unless a crop enlarges it)"
        report.add("warning", part, what, tiny)
    if without:
        text = f"{without} of {len(dataset)} pictures"
        report.add("note", part, "pictures without an object", [Record(text)])


def _check_classes(report: Report) -> None:
    names = max((tuple(d.classes) for d in report.parts.values()), key=len, default=())
    for part, dataset in report.parts.items():
        boxes, pictures = (np.zeros(len(dataset.classes) + 1, int) for _ in range(2))
        for i in range(len(dataset)):
            labels = dataset.target(i)[:, 4].astype(int)
            np.add.at(boxes, labels, 1)
            pictures[np.unique(labels)] += 1
        for k, name in enumerate(dataset.classes, 1):
            row = report.classes.setdefault(name, {})
            row[part] = (int(boxes[k]), int(pictures[k]))
    for part, what in (
        ("train", "class without a box to train on"),
        ("test", "class without a box to test on"),
    ):
        if part not in report.parts:
            continue
        missing = [name for name in names if not report.classes[name].get(part, (0, 0))[0]]
        # A test split of COCO has no boxes at all.
        if len(missing) < len(names) or part == "train":
            level = "warning" if part == "train" else "note"
            report.add(level, part, what, [Record(name) for name in missing])
    alike = defaultdict(list)
    for name in names:
        alike[re.sub(r"[\s_-]", "", name).casefold()].append(name)
    found = [Record(", ".join(group)) for group in alike.values() if len(group) > 1]
    report.add("warning", "", "classes whose names differ in case or spaces alone", found)


# ---------------------------------------------------------------- prior boxes


def best_overlaps(config: PriorConfig, boxes: np.ndarray) -> np.ndarray:
    """The IoU of every box with the prior box that it overlaps most: [n, 4] relative -> [n].

    Of prior boxes of one shape it is one whose centre is nearest, along both axes: so a few dozen
    have to be compared instead of thousands.
    """
    from layers import PriorBox

    priors = PriorBox(config)().double().numpy()
    low, high = boxes[:, :2].astype(np.float64), boxes[:, 2:4].astype(np.float64)
    area = (high - low).prod(1)
    best, start = np.zeros(len(boxes)), 0
    for side, shapes in zip(config.feature_maps, config.boxes_per_cell, strict=True):
        cells = priors[start : start + side * side * shapes].reshape(side, side, shapes, 4)
        start += side * side * shapes
        axis = cells[0, :, 0, 0]  # of rows as of columns
        centre = axis[np.searchsorted((axis[1:] + axis[:-1]) / 2, (low + high) / 2)]
        for shape in cells[0, 0, :, 2:]:
            shared = np.minimum(high, centre + shape / 2) - np.maximum(low, centre - shape / 2)
            shared = shared.clip(0).prod(1)
            np.maximum(best, shared / (area + shape.prod() - shared), out=best)
    return best


def _check_priors(report: Report) -> None:
    part = next((p for p in PARTS if p in report.parts), None)
    if part is None:
        return
    dataset = report.parts[part]
    scaled = [dataset.target(i) / (*dataset.image_size(i) * 2, 1) for i in range(len(dataset))]
    targets = np.concatenate([np.zeros((0, 5)), *scaled])
    own = np.repeat(np.arange(len(dataset)), [len(t) for t in scaled])
    boxes, labels = targets[:, :4], targets[:, 4].astype(int)
    present = np.unique(labels)
    best = {
        (name, size): best_overlaps(PRIORS[name, size], boxes)
        for size in report.sizes
        for name in dict.fromkeys(n for n, _ in PRIORS)
    }
    for (name, size), overlaps in best.items():
        for k in present:
            found = overlaps[labels == k]
            report.fits.append(
                {
                    "class": dataset.classes[k - 1],
                    "size": size,
                    "priors": name,
                    "boxes": len(found),
                    "share": float((found >= MATCHED).mean()),
                    "mean": float(found.mean()),
                    "claimed": int((found < MATCHED).sum()),
                }
            )
    for size in report.sizes:
        overlaps = best[report.options["priors"], size]
        fits = {k: (overlaps[labels == k] >= MATCHED).mean() for k in present}
        low = [k for k in present if fits[k] < LOW_SHARE]
        low.sort(key=lambda k: -(overlaps[labels == k] < MATCHED).sum())
        records = []
        for k in low:
            worst = np.flatnonzero(labels == k)[overlaps[labels == k].argmin()]
            i = int(own[worst])
            records.append(
                Record(
                    f"{dataset.classes[k - 1]}: {fits[k]:.0%} of {(labels == k).sum()} boxes reach "
                    f"it, the others claim the one prior box nearest to them, the worst at "
                    f"{overlaps[worst]:.2f}",
                    ((part, i),),
                    tuple(dataset.target(i)[worst - own.searchsorted(i), :4].tolist()),
                )
            )
        what = f"class that fits the prior boxes badly at {size} (IoU {MATCHED})"
        report.add("warning", part, what, records)
        if low:
            report.advice += _advice(report, size, best, boxes, labels, low, dataset.classes)


def _advice(report, size, best, boxes, labels, low, classes) -> Iterator[str]:
    """What there is to change for classes that fit badly, each with what it would reach."""
    name = report.options["priors"]
    config, here = PRIORS[name, size], best[name, size]
    rows = np.isin(labels, low)
    sides = (boxes[rows, 2:] - boxes[rows, :2]) * size
    small, middle, large = np.quantile(np.sqrt(sides.prod(1)), (0.1, 0.5, 0.9))
    long = np.quantile(np.maximum(sides[:, 0] / sides[:, 1], sides[:, 1] / sides[:, 0]), 0.9)
    names = ", ".join(classes[k - 1] for k in low[:5]) + (" ..." if len(low) > 5 else "")
    yield (
        f"At {size}, of the {rows.sum()} boxes of {names}, {(here[rows] >= MATCHED).mean():.1%} "
        f"reach an IoU of {MATCHED} with a prior box. Eight in ten are {small:.0f} to {large:.0f} "
        f"px large (root of the area, half under {middle:.0f}), one in ten is over {long:.1f} "
        f"times as long as wide; prior boxes begin at {config.min_sizes[0]:g} px and are up to "
        f"{max(map(max, config.aspect_ratios))} times as long as wide."
    )
    ways = {f"-s {s}": best[name, s] for s in report.sizes if s != size}
    others = {PRIORS[n, size]: best[n, size] for n, s in PRIORS if s == size and n != name}
    fitted = _fitted(config, boxes, labels)
    for other, overlaps in {**others, fitted: best_overlaps(fitted, boxes)}.items():
        numbers = ", ".join(f"{v:g}" for v in other.min_sizes)
        line = f"{name}_{size} = _ssd{size}(({numbers}), {other.max_sizes[-1]:g})"
        ways[f"{line} in data/config.py"] = overlaps
    reached = {
        way: ((there[rows] >= MATCHED).mean(), (there >= MATCHED).mean())
        for way, there in ways.items()
    }
    for way, (share, whole) in sorted(reached.items(), key=lambda item: -item[1][0]):
        if share > (here[rows] >= MATCHED).mean() + 0.01:
            yield f"  {way}: {share:.1%} ({whole:.1%} of all boxes)"


def _fitted(config: PriorConfig, boxes: np.ndarray, labels: np.ndarray) -> PriorConfig:
    """The preset with the sizes that fit these boxes best, by the mean share of the classes.

    As in SSD, the first source map has its own size and the others evenly spaced ones up to the
    preset's last; tried are first sizes among the boxes' and steps to the second.
    """
    if len(boxes) > 20_000:  # a sample shows it
        chosen = np.random.default_rng(0).choice(len(boxes), 20_000, replace=False)
        boxes, labels = boxes[chosen], labels[chosen]
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) * config.size
    last = config.min_sizes[-1]

    def fit(candidate: PriorConfig) -> float:
        reached = best_overlaps(candidate, boxes) >= MATCHED
        return float(np.mean([reached[labels == k].mean() for k in np.unique(labels)]))

    candidates = [config]
    for first in np.quantile(sides, (0.02, 0.05, 0.1, 0.2, 0.3)).clip(4, last / 4):
        for step in (1.5, 2, 2.5, 3):
            rest = np.linspace(first * step, last, len(config.min_sizes) - 1)
            sizes = tuple(float(round(v)) for v in (first, *rest))
            candidates.append(
                replace(config, min_sizes=sizes, max_sizes=(*sizes[1:], config.max_sizes[-1]))
            )
    return max(candidates, key=fit)


# ---------------------------------------------------------------- output


def summary(report: Report, shown: int = 5) -> str:
    """The report as text, with the first `shown` records of every finding."""
    lines = [_title(report, part) for part in report.parts]
    for finding in report.by_level():
        found = len(finding.records)
        part = finding.part or "train and test"
        lines += ["", f"{finding.level}, {part}: {finding.what}: {found}"]
        lines += [f"    {record.text}" for record in finding.records[:shown]]
        if found > shown:
            lines.append(f"    ... and {found - shown} more")
    width = max([24, *(len(name) for name in report.classes)])
    if report.classes:
        parts = list(report.parts)
        heads = "".join(f"{f'{part} boxes':>14}{'pictures':>10}" for part in parts)
        lines += ["", f"{'class':<{width}}{heads}"]
        for name, row in report.classes.items():
            cells = (row.get(part, (0, 0)) for part in parts)
            lines.append(
                f"{name:<{width}}" + "".join(f"{boxes:>14,}{n:>10,}" for boxes, n in cells)
            )
    if report.fits:
        columns = list(dict.fromkeys((f["priors"], f["size"]) for f in report.fits))
        shares = {(f["class"], f["priors"], f["size"]): f["share"] for f in report.fits}
        heads = "".join(f"{f'{name} {size}':>12}" for name, size in columns)
        lines += ["", f"boxes that reach an IoU of {MATCHED} with a prior box of"]
        lines.append(" " * width + heads)
        for name in dict.fromkeys(f["class"] for f in report.fits):
            cells = "".join(f"{shares[(name, *column)]:>12.1%}" for column in columns)
            lines.append(f"{name:<{width}}{cells}")
    if report.advice:
        lines += ["", *report.advice]
    return "\n".join([*lines, "", verdict(report)])


def _title(report: Report, part: str) -> str:
    dataset, sets = report.parts[part], sets_name(report.options[PARTS[part]])
    boxes = sum(row[part][0] for row in report.classes.values() if part in row)
    return f"{part}: {sets} of {dataset.root}, {len(dataset):,} pictures, {boxes:,} boxes"


def verdict(report: Report) -> str:
    counts = {level: report.count(level) for level in LEVELS}
    return ", ".join(f"{n:,} {level}{'' if n == 1 else 's'}" for level, n in counts.items())


def as_json(report: Report) -> dict:
    """Everything, as plain data."""
    return {
        "root": str(report.options["root"]),
        "dataset": report.options["dataset"],
        "priors": report.options["priors"],
        "sets": {
            part: {"names": sets_name(report.options[PARTS[part]]), "pictures": len(dataset)}
            for part, dataset in report.parts.items()
        },
        "counts": {level: report.count(level) for level in LEVELS},
        "findings": [
            {
                "level": f.level,
                "part": f.part or "train and test",
                "what": f.what,
                "records": [record.text for record in f.records],
            }
            for f in report.by_level()
        ],
        "classes": {
            name: {part: {"boxes": n, "pictures": m} for part, (n, m) in row.items()}
            for name, row in report.classes.items()
        },
        "fits": report.fits,
        "advice": report.advice,
    }


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --ground: #fff; --soft: #eef0f3; --bar: #4a7fd6;
  --error: #c62828; --warning: #b26a00; --note: #5a6572; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --ground: #16191d; --soft: #262b31;
  --bar: #2f5a9e; --error: #ff7b72; --warning: #f0b35a; --note: #9aa5b1; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
ul { margin: .3rem 0; padding-left: 1.2rem; }
.advice { white-space: pre-wrap; }
.row { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; width: min-content; min-width: 13rem; background: var(--soft); padding: .5rem;
  border-radius: 6px; }
figure div { display: flex; gap: .5rem; }
figcaption { font-size: .8rem; }
table { border-collapse: collapse; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; overflow-wrap: normal; }
td.bar { min-width: 9rem; }
td.bar div { background: var(--soft); border-radius: 3px; }
td.bar span { display: block; background: var(--bar); border-radius: 3px; padding: 0 .3rem;
  min-width: fit-content; box-sizing: border-box; white-space: nowrap; }
td.low span { background: var(--warning); color: var(--ground); }
"""


def sheet(report: Report, shown: int = 12) -> str:
    """The report as one HTML page, with the first `shown` pictures of every finding."""
    e = html.escape
    out = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width"><title>Data check</title>',
        f"<style>{STYLE}</style></head><body><h1>Data check</h1>",
        *(f"<p>{e(_title(report, part))}</p>" for part in report.parts),
        f"<p><b>{verdict(report)}</b></p>",
    ]
    for finding in report.by_level():
        part = finding.part or "train and test"
        out.append(
            f'<h3><span class="{finding.level}">{finding.level}</span>, {part}: '
            f"{e(finding.what)}: {len(finding.records):,}</h3>"
        )
        # Records about one picture share a figure; those about none are a group each.
        groups = defaultdict(list)
        for n, record in enumerate(finding.records):
            groups[record.pictures or n].append(record)
        figures, items = [], []
        for pictures, records in [*groups.items()][:shown]:
            texts = [e(r.text.replace(f"{report.options['root']}/", "")) for r in records[:4]]
            texts += [f"and {len(records) - 4:,} more"] if len(records) > 4 else []
            boxes = [record.box for record in records if record.box is not None]
            images = "".join(_images(report, pictures, boxes) if records[0].pictures else ())
            if images:
                caption = "<br>".join(texts)
                figures.append(
                    f"<figure><div>{images}</div><figcaption>{caption}</figcaption></figure>"
                )
            else:
                items += [f"<li>{text}</li>" for text in texts]
        if figures:
            out.append(f'<div class="row">{"".join(figures)}</div>')
        if len(groups) > shown:
            items.append(f"<li>and in {len(groups) - shown:,} more places</li>")
        if items:
            out.append(f"<ul>{''.join(items)}</ul>")
    if report.classes:
        out.append("<h2>Boxes of each class</h2>" + _class_table(report))
    if report.fits:
        out.append(
            f"<h2>Boxes that reach an IoU of {MATCHED} with a prior box</h2>" + _fit_table(report)
        )
    out.append(f'<p class="advice">{e(chr(10).join(report.advice))}</p>')
    return "\n".join([*out, "</body></html>\n"])


def _bar(share: float, text: str, low: bool = False) -> str:
    kind = "bar low" if low else "bar"
    return f'<td class="{kind}"><div><span style="width:{share:.1%}">{text}</span></div></td>'


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _class_table(report: Report) -> str:
    parts, rows = list(report.parts), []
    most = {p: max([1, *(r.get(p, (0, 0))[0] for r in report.classes.values())]) for p in parts}
    for name, row in report.classes.items():
        cells = ""
        for part in parts:
            boxes, pictures = row.get(part, (0, 0))
            cells += _bar(boxes / most[part], f"{boxes:,}") + f"<td>{pictures:,}</td>"
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    heads = [head for part in parts for head in (f"{part} boxes", "pictures")]
    return _table(["class", *heads], rows)


def _fit_table(report: Report) -> str:
    columns = list(dict.fromkeys((f["priors"], f["size"]) for f in report.fits))
    cells = defaultdict(str)
    for fit in report.fits:
        share = fit["share"]
        cells[fit["class"]] += _bar(share, f"{share:.1%}", low=share < LOW_SHARE)
    rows = [f"<tr><td>{html.escape(name)}</td>{bars}</tr>" for name, bars in cells.items()]
    return _table(["class", *(f"{name} {size}" for name, size in columns)], rows)


def _images(
    report: Report, pictures: Sequence[tuple[str, int]], odd: Sequence[tuple[float, ...]]
) -> Iterator[str]:
    """<img> elements of pictures with their boxes in green; the odd boxes, red, in the first."""
    for n, (part, i) in enumerate(pictures):
        dataset = report.parts[part]
        image, _ = _read(dataset, i)
        if image is None:
            continue
        height, width = image.shape[:2]
        scale = min(1, 208 / max(height, width))
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, sides, interpolation=cv2.INTER_AREA)
        drawn = [(box, (90, 200, 90), 1) for box in dataset.target(i)[:, :4]]
        drawn += [(box, (40, 30, 230), 2) for box in odd if n == 0]
        for box, colour, line in drawn:
            # Far outside would be beyond OpenCV's integers.
            ends = (np.multiply(box, scale) + 0.5).clip(-9, 1000).astype(int).tolist()
            cv2.rectangle(image, ends[:2], ends[2:], colour, line)
        data = base64.b64encode(cv2.imencode(".jpg", image)[1]).decode()
        yield f'<img alt="" src="data:image/jpeg;base64,{data}">'


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    sizes = sorted({size for _, size in PRIORS})
    p = argparse.ArgumentParser(
        prog="python -m tools.check",
        description="Tell what a training would see, before it. The options mean what those of "
        "train_test.py do.",
        epilog="Exit status: 0 no errors, 1 errors (--strict: or warnings), 2 bad usage.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.add_argument("--root", metavar="DIR", help="where the data are")
    p.add_argument("-d", "--dataset", choices=DATASETS, help="layout of the data (VOC)")
    p.add_argument("--train_sets", metavar="SETS", help="e.g. 2007_trainval,2012_trainval")
    p.add_argument("--test_sets", metavar="SETS", help="e.g. 2007_test, or test")
    p.add_argument("--classes", metavar="NAMES", help="a,b,c or a file with one name a line")
    p.add_argument(
        "--size", type=int, nargs="+", choices=sizes, default=sizes,
        help="of the network's input, for the fit of the prior boxes (all)",
    )  # fmt: skip
    priors = [*dict.fromkeys(name for name, _ in PRIORS)]
    p.add_argument("--priors", choices=priors, help="whose prior boxes (those of --dataset)")
    p.add_argument("--json", metavar="OUT", default=None, help="write everything to this file")
    p.add_argument("--html", metavar="OUT", default=None, help="write a page with pictures")
    p.add_argument("--workers", type=positive, default=8, metavar="N", help="threads (8)")
    p.add_argument("--strict", action="store_true", default=False, help="warnings count, too")
    return p.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # The defaults of a training are known to its command alone, which stands above data.
    from train_test import resolve

    given = vars(parse(argv))
    strict, workers, sizes = (given.pop(name) for name in ("strict", "workers", "size"))
    data, page = given.pop("json"), given.pop("html")
    silent = logging.NullHandler()  # the readers' warnings are findings here
    LOGGER.addHandler(silent)
    try:
        for path in filter(None, (data, page)):
            check_writable(path)
        report = check(resolve(given), dict.fromkeys(sizes), workers, _show_progress)
        if data:
            write_json(data, as_json(report))
        if page:
            with atomic_write(page) as file:
                file.write(sheet(report).encode("utf-8", "replace"))
    finally:
        LOGGER.removeHandler(silent)
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be beyond its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    print(summary(report))
    if page:
        print(f"\nThe page with pictures is {page}")
    return int(report.count("error") > 0 or (strict and report.count("warning") > 0))


def _show_progress(part: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r{part}: {done:,} of {total:,} pictures{end}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
