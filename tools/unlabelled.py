"""Objects that annotators seem to have missed: found in tests, shown, and added to annotations."""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DetectionData
from data.coco_json import extents, read_json
from data.judge import FOREGROUND, overlaps
from data.skips import SkipKind
from data.truth import Truth
from data.voc_xml import read_xml
from data.yolo_layout import YOLOFolder, relative
from tools.annotations import clipped, coco_records, voc_xml, yolo_txt
from tools.figures import Folder
from tools.mistakes import MOST, data_url, draw_mistake
from tools.outputs import Found, write
from tools.results import Test
from tools.sources import Frame, Source
from tools.tables import Table
from utils.errors import UserError
from utils.files import read_text

NEAR = 0.3
"""Least IoU at which a detection may belong to an object."""
Added, Written = Sequence[tuple[int, Found]], Iterator[tuple[Path, bytes]]
"""Positions of images in the data set and their new objects; files and their new content."""


class Omission(NamedTuple):
    """A detection of an object that seems to have no annotation."""

    image: int  # index in the data set
    label: int  # from 1
    box: np.ndarray  # extents
    score: float  # mean of the tests' best agreeing scores; 0 for a test without one
    tests: int  # number of tests with an agreeing score of at least `score`


def all_objects(test: Test) -> Truth:
    """Return the ground truth and, with label 0, the recorded objects of classes left out."""
    truth, skipped = test.judged.truth, test.dataset.skipped
    rows = np.array([(skip.image, *skip.box) for skip in skipped
                     if skip.kind is SkipKind.UNKNOWN_CLASS], float).reshape(-1, 5)  # fmt: skip
    images, at = rows[:, 0].astype(int), np.searchsorted(truth.images, rows[:, 0])
    return Truth(np.insert(truth.images, at, images),
                 np.insert(truth.boxes, at, rows[:, 1:] + (0, 0, 1, 1), axis=0),
                 np.insert(truth.labels, at, 0), np.insert(truth.ignored, at, False), truth.rule)


def unannotated(objects: Truth, image: int, boxes: np.ndarray) -> list[int]:
    """Return the positions of the boxes, extents [n, 4], that belong to no object of an image.

    Such a box has an IoU below `NEAR` with each object and each earlier box returned. For a COCO
    crowd, the share of the box inside the crowd replaces the IoU.
    """
    there = slice(*np.searchsorted(objects.images, (image, image + 1)))
    crowds = objects.ignored[there] & (objects.rule == "coco")
    near = overlaps(boxes[:, None], objects.boxes[there], crowds).max(1, initial=0)
    new = []
    for k in np.flatnonzero(near < NEAR).tolist():
        if overlaps(boxes[k], boxes[new]).max(initial=0) < NEAR:
            new.append(k)
    return new


def list_omissions(tests: Sequence[Test], score: float) -> list[Omission]:
    """Return the detections of at least `score` that are `unannotated`.

    tests: of the same images; detections of all tests count. A detection agrees with an omission if
    both have the same class and an IoU of at least `FOREGROUND`. Images are sorted by s² / (s + n),
    largest first: s is the sum of the scores of their omissions, n their number of objects.
    """
    objects, listed = all_objects(tests[0]), []
    founds = [test.judged.found for test in tests]
    tables = ((*found, np.full(len(found.images), n)) for n, found in enumerate(founds))
    images, *columns = map(np.concatenate, zip(*tables, strict=True))
    order = np.lexsort((-columns[2], images))
    images, *columns = (column[order] for column in (images, *columns))
    for image in np.unique(images[columns[2] >= score]):
        rows = slice(*np.searchsorted(images, (image, image + 1)))
        boxes, labels, scores, owners = (column[rows] for column in columns)
        for k in unannotated(objects, image, boxes[: np.count_nonzero(scores >= score)]):
            iou = overlaps(boxes, boxes[k])
            agree = (iou >= FOREGROUND) & (labels == labels[k])
            best = [scores[agree & (owners == n)].max(initial=0) for n in range(len(tests))]
            listed.append(Omission(image, labels[k], boxes[k], float(np.mean(best)),
                                   sum(each >= score for each in best)))
    known = np.bincount(objects.images, minlength=len(tests[0].dataset))
    sums = np.bincount([o.image for o in listed], [o.score for o in listed], len(known))
    lacks = sums**2 / (sums + known).clip(1e-9)
    return sorted(listed, key=lambda o: (-lacks[o.image], o.image, -o.score))


def show_omissions(folder: Folder, tests: Sequence[Test], score: float,
                   most: int) -> tuple[str, list[str]]:
    """Return up to `most` omissions as HTML to tick, "" for none, and notes for people."""
    dataset, objects, most = tests[0].dataset, all_objects(tests[0]), min(most, MOST)
    omissions = list_omissions(tests, score)
    head = ("image", "class", "score", "tests", "x1", "y1", "x2", "y2")
    table = Table(head, [(dataset.ids[o.image], dataset.classes[o.label - 1], o.score, o.tests,
                          *o.box.tolist()) for o in omissions])  # fmt: skip
    link = folder.table("unlabelled", table)
    if not omissions:
        return "", []
    notes = [f"objects without annotation may be annotated, in a class left out ({skip.detail})"
             for skip in dataset.skipped if skip.kind is SkipKind.CLASSES_LEFT_OUT]
    articles = ""
    for image, group in groupby(omissions[:most], lambda o: o.image):
        boxes = objects.boxes[objects.images == image]
        try:
            pixels = dataset.pull_image(image)
        except UserError as error:
            notes.append(str(error))
            continue
        drawn = ((o, draw_mistake(pixels, None, o.box, boxes)) for o in group)
        figures = "".join(_figure(*each, dataset, len(tests)) for each in drawn)
        articles += (f"<article><h3>{escape(str(dataset.ids[image]))}</h3><p>{len(boxes)} annotated"
                     f'</p><div class="gallery">{figures}</div></article>')
    if articles and tests[0].results.values["dataset"] not in WRITERS:
        notes.append(f"accepted objects can be added to {', '.join(WRITERS)} annotations only; "
                     "convert the data and test again")
    elif articles:
        articles += '<button id="save">Save the accepted objects</button>'
    if most and (left_out := omissions[most:]):
        notes.append(f"{len(left_out)} objects without annotation are not shown; unlabelled.csv "
                     "lists all")
    folders = ", ".join(escape(str(test.directory)) for test in tests)
    return f"<p>Tests: {folders}. All of their objects: {link}</p>{articles}", notes


def _figure(o: Omission, image: np.ndarray, dataset: DetectionData, tests: int) -> str:
    name, (x1, y1, x2, y2) = dataset.classes[o.label - 1], o.box.tolist()
    count = f", found by {o.tests} of {tests}" if tests > 1 else ""
    text = escape(f"{name} {o.score:.2f}{count}")
    value = json.dumps({"image": str(dataset.ids[o.image]), "class": name, "score": o.score,
                        "bbox": [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)]})
    # Browsers restore ticks by position, also on a page that was written anew.
    return (f'<figure data-class="{o.label - 1}"><label><img alt="{text}" '
            f'src="{data_url(image)}"><br><input type="checkbox" '
            f'autocomplete="off" value="{escape(value)}"> {text}</label></figure>')


def merge(test: Test, accepted: Path, folder: Path) -> str:
    """Write annotation files with the objects that a page saved as accepted, and return a line.

    A file holds the content of the data set's file and the new objects, in the same format. Objects
    that are annotated already are left out. folder: new or empty.
    """
    dataset, kind = test.dataset, test.results.values["dataset"]
    if dataset is None or kind not in WRITERS:
        raise UserError(f"{test.directory}: annotations of {kind} cannot be written, only of "
                        f"{', '.join(WRITERS)}; convert them" if dataset else test.notes[-1])
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files, which may be corrected by hand; give another "
                        "--output, or remove that folder")
    rows, objects, added, inside = _read_accepted(accepted, test), all_objects(test), [], 0
    for image in np.unique(rows[:, 0]).astype(int):
        _, labels, scores, *sides = rows[rows[:, 0] == image].T
        blank = np.broadcast_to(np.uint8(0), dataset.pull_image(image).shape)  # takes no memory
        frame = Frame(Source(str(dataset.image_path(image)), "", "image"), blank)
        boxes = extents(np.stack(sides, 1)) - (0, 0, 1, 1)
        found = clipped(Found(frame, boxes, scores, labels.astype(int)))
        inside += len(found.labels)
        if new := unannotated(objects, image, found.boxes + (0, 0, 1, 1)):
            added.append((image, Found(frame, *(column[new] for column in found[1:4]))))
    total = sum(len(found.labels) for _, found in added)
    lost = f"; {len(rows) - inside} have no area in their image" if inside < len(rows) else ""
    if not added:
        return f"{accepted}: no object is new{lost}"
    files = dict(WRITERS[kind](dataset, added))
    base = os.path.commonpath([os.path.abspath(path) for path in (dataset.root, *files)])
    for path, data in files.items():
        write(folder, relative(path, base), data)
    return (f"{folder}: {len(files)} files with {total} new objects; {inside - total} were "
            f"annotated already{lost}. Copy the files over those in {base}.")


def _read_accepted(path: Path, test: Test) -> np.ndarray:
    """Return a row of each accepted object: image, label, score, x, y, width, height."""
    images = {str(id): i for i, id in enumerate(test.dataset.ids)}
    labels = {name: label for label, name in enumerate(test.dataset.classes, 1)}
    each = records = read_json(path)
    rows = []
    try:
        if not isinstance(records, list):
            raise TypeError("no list")
        for each in records:
            x, y, width, height = each["bbox"]
            row = images[each["image"]], labels[each["class"]], each["score"], x, y, width, height
            rows.append(np.asarray_chkfinite(row, float))
        return np.reshape(rows, (-1, 7))
    except Exception as error:  # of any content
        raise UserError(f"{path}: {each!r:.200} is no object of {test.directory} ({error!r:.99}); "
                        "save the file again from the page of that test") from error


def _voc(dataset: DetectionData, added: Added) -> Written:
    for image, found in added:
        path = dataset.annotations[image].path
        new = root = ElementTree.fromstring(
            voc_xml(found, dataset.image_path(image).name, dataset.classes))
        if path.exists():  # CVAT writes none for an image without objects
            root = read_xml(path)
            root.extend(new.iter("object"))
            ElementTree.indent(root)
        yield path, ElementTree.tostring(root, "utf-8") + b"\n"


def _yolo(dataset: DetectionData, added: Added) -> Written:
    if YOLOFolder(dataset.root).keypoints:
        raise UserError(f"{dataset.root}: labels have keypoints (kpt_shape), accepted objects have "
                        "none; annotate them by hand")
    paths = [dataset.annotations[image].path for image, _ in added]
    lines = [_label_lines(path) for path in paths]
    # Ultralytics misreads boxes beside polygons, and drops all outlines if one object has none. So
    # a file without objects gets what the others have.
    usual = not all(lines) and any(
        _has_polygons(_label_lines(each.path)) for each in dataset.annotations)
    for (_, found), path, old in zip(added, paths, lines, strict=True):
        names = np.array(dataset.classes)[found.labels - 1]
        if unknown := {*names.tolist()} - {*dataset.numbers}:
            raise UserError(f"{dataset.root}: add {min(unknown)} to the names that it declares")
        found = found._replace(labels=np.array([dataset.numbers[name] + 1 for name in names]))
        new = yolo_txt(found, "", dataset.classes, _has_polygons(old) if old else usual)
        yield path, "".join(f"{line}\n" for line in old).encode() + new


def _label_lines(path: Path) -> list[str]:
    return read_text(path).rstrip().splitlines() if path.exists() else []


def _has_polygons(lines: Sequence[str]) -> bool:
    return any(len(line.split()) > 5 for line in lines)


def _coco(dataset: DetectionData, added: Added) -> Written:
    ids = [*dataset.category_ids.values()]
    for path, group in groupby(added, lambda each: dataset.annotation_path(each[0])):
        document, new = read_json(path), []
        for image, found in group:
            _, records = coco_records(found, "", dataset.classes, ids)
            new += [{"image_id": int(dataset.file_ids[image]), **each} for each in records]
        used = (str(each.get("id")).removesuffix(".0") for each in document["annotations"])
        last = max(map(int, filter(str.isdecimal, used)), default=0)
        document["annotations"] += [{"id": k, **each} for k, each in enumerate(new, last + 1)]
        yield path, json.dumps(document).encode()


WRITERS = {"VOC": _voc, "YOLO": _yolo, "COCO": _coco}
