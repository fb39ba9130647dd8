"""Findings on the boxes and classes of a data set."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from data.skips import SkipKind
from models.info import published_detection
from tools.findings import BOTH, Part, Record, Report

# No prior box is more than 3 times as long as wide, so none reaches an IoU over 0.24 with a sliver,
# half of what a match asks for. Most slivers are slips of the mouse.
SLIVER = 20
WHOLE = 0.99  # share of both sides
SAME = 0.99  # IoU from which two boxes of a class are one object annotated twice
NEIGHBOURS = 64  # compared with each box, so time does not grow with the square of the boxes
FEW = 10  # boxes of a class, below which its AP is mostly luck
SKEW, CHANCE = 2, 0.001  # factor between shares, and probability of a false alarm in a report
BESIDE = (SkipKind.LABEL_WITHOUT_IMAGE, SkipKind.NO_ANNOTATION_FILE)  # of no image set


def check_boxes(report: Report, name: str) -> None:
    """Add what the reader changed or left out, and boxes that are probably mistakes."""
    part = report.parts[name]
    kinds: dict[SkipKind, list[Record]] = defaultdict(list)
    told = {skip for other, each in report.parts.items() if other != name
            for skip in each.dataset.skipped if skip.kind in BESIDE}
    for skip in part.dataset.skipped:
        if skip in told:
            continue
        images = () if skip.image is None else ((name, skip.image),)
        kinds[skip.kind].append(Record(skip.detail, images, skip.box))
    for kind, records in kinds.items():
        asked = kind is SkipKind.CLASSES_LEFT_OUT and report.options.classes
        report.add("note" if asked else kind.level, name, kind.text, records)
    sides, sizes = part.boxes[:, 2:] - part.boxes[:, :2], part.sizes[part.images]
    for what, which in (
            ("tiny box, a side under 1 % of the image's (dropped unless a crop enlarges it)",
             # The rule of SSDAugmentation; a test drops no box.
             (100 * sides < sizes).any(1) & (name == "train")),
            (f"sliver, over {SLIVER} times as long as wide, which no prior box fits",
             sides.max(1) > SLIVER * sides.min(1)),
            ("box over the whole image", (sides + 1 >= WHOLE * sizes).all(1)),
            ("box that occurs twice (same class and place)", _repeated(part))):
        records = []
        for k in np.flatnonzero(which):
            image, label = (name, int(part.images[k])), part.dataset.classes[part.labels[k] - 1]
            text = "{}: {}, {:.4g} x {:.4g} in {} x {}".format(
                report.path(image), label, *sides[k], *sizes[k])
            records.append(Record(text, (image,), tuple(part.boxes[k].tolist())))
        report.add("warning", name, what, records)
    if without := len(part.sizes) - len({*part.images.tolist(), *part.dataset.unread}):
        text = f"{without} of {len(part.sizes)} images"
        report.add("note", name, "images without an object", [Record(text)])
    _check_limits(report, name)


def _repeated(part: Part) -> np.ndarray:
    """Return which boxes are an earlier box of the same class and image again, bool [M]."""
    repeated = np.zeros(len(part.boxes), bool)
    order = np.lexsort((*part.boxes.T[::-1], part.labels, part.images))
    images, labels, boxes = part.images[order], part.labels[order], part.boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for shift in range(1, NEIGHBOURS):
        alike = (images[shift:] == images[:-shift]) & (labels[shift:] == labels[:-shift])
        if not len(rows := np.flatnonzero(alike)):
            break
        a, b = boxes[rows], boxes[rows + shift]
        shared = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
        shared = shared.clip(0).prod(1)
        same = shared > SAME * (areas[rows] + areas[rows + shift] - shared)
        repeated[order[rows[same] + shift]] = True
    return repeated


def _check_limits(report: Report, name: str) -> None:
    """Find images with more objects than a published test keeps detections."""
    part, limits = report.parts[name], published_detection(report.options.dataset)
    columns = np.stack([part.images, part.labels], 1)
    for of, groups, most, option in ((" of a class", columns, limits.per_class, "--max_per_class"),
                                     ("", columns[:, :1], limits.top_k, "--max_detections")):
        found, counts = np.unique(groups, axis=0, return_counts=True)
        what = f"image with more objects{of} than a test keeps detections ({most}; {option})"
        report.add("warning", name, what, (
            Record(f"{report.path((name, image))}: {count} "
                   + ", ".join(part.dataset.classes[k - 1] for k in label), ((name, image),))
            for (image, *label), count in zip(found.tolist(), counts.tolist(), strict=True)
            if count > most))


def check_classes(report: Report) -> None:
    """Find classes that are rare, missing, unevenly split or named alike, and unscorable tests."""
    classes = report.classes()
    for name, part in report.parts.items():
        counts = {key: part.count(key)[0] for key in classes}
        if name == "test" and part.dataset.truth().ignored.all():
            what = "nothing to score: no object of a class that is not difficult or a crowd"
            report.add("warning", name, what, [Record(report.sets(name))])
        if name == "train" or any(counts.values()):  # a test split of COCO has no boxes
            missing = (Record(key) for key in classes if not counts[key])
            report.add("warning", name, f"class without a box to {name} on", missing)
        few = (Record(f"{key}: {n}") for key, n in counts.items() if 0 < n < FEW)
        report.add("warning", name, f"class with fewer than {FEW} boxes to {name} on", few)
    if len(report.parts) == 2:
        what = f"class over {SKEW} times as frequent in one part as in the other"
        report.add("warning", BOTH, what, _skewed(*report.parts.values(), classes))
    alike = defaultdict(list)
    for key in classes:
        alike[re.sub(r"[\s_-]", "", key).casefold()].append(key)
    groups = [Record(", ".join(names)) for names in alike.values() if len(names) > 1]
    report.add("warning", BOTH, "classes whose names differ only in case or spaces", groups)


def _skewed(train: Part, test: Part, classes: Sequence[str]) -> Iterator[Record]:
    """Yield the classes that chance has not spread so unevenly over the images of the parts.

    The test is chi-square with Yates's correction on images with and without the class, because
    boxes of one image are no independent draws.
    """
    # Bonferroni's correction: many classes make a false alarm no likelier.
    limit = NormalDist().inv_cdf(1 - CHANCE / (2 * max(len(classes), 1))) ** 2
    images = np.array([len(train.sizes), len(test.sizes)])
    for key in classes:
        having = np.array([train.count(key)[1], test.count(key)[1]])
        table, shares = np.array([having, images - having]), having / images.clip(1)
        expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
        if not (having.all() and expected.all() and shares.max() > SKEW * shares.min()):
            continue  # a class without boxes is told as such
        if ((np.abs(table - expected) - 0.5).clip(0) ** 2 / expected).sum() > limit:
            yield Record("{}: in {:.1%} of the training images, {:.1%} of the test images".format(
                key, *shares))
