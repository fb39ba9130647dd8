"""Objects that annotators seem to have missed: found in tests, shown, and added to annotations."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DetectionData
from data.coco_json import extents, read_json
from data.judge import FOREGROUND, Judged, overlaps
from data.voc_xml import read_xml
from data.yolo_layout import relative
from tools.annotations import coco_records, voc_xml, yolo_txt
from tools.figures import Folder
from tools.mistakes import as_jpeg, draw_mistake
from tools.outputs import Found, write
from tools.results import Test
from tools.sources import Frame, Source
from tools.tables import Table
from utils.errors import UserError
from utils.files import read_bytes

NEAR = 0.3
"""IoU with an object from which a detection may be about it, as a duplicate or a loose box."""
Added, Written = Sequence[tuple[int, Found]], Iterator[tuple[Path, bytes]]
"""Positions of images in the data set and their new objects; files and their new content."""


class Omission(NamedTuple):
    """An object that has no annotation, to all appearance."""

    image: int  # index in the data set
    label: int  # from 1
    box: np.ndarray  # extents
    score: float  # mean over the tests of their best score of a detection that agrees, or 0
    tests: int  # how many have one that counts


def list_omissions(tests: Sequence[Judged], score: float) -> list[Omission]:
    """Return the detections of at least `score` that are about no object, of whatever class.

    tests: of the same images. Listed are detections whose IoU with each object, ignored ones too,
    and with each better detection that is listed, is below `NEAR`. A detection of the same class
    with an IoU of at least `FOREGROUND` agrees. Images come first that lack most: the sum of
    scores, times its share in the sum of scores and annotated objects, is largest.
    """
    truth, listed = tests[0].truth, []
    tables = ((*test.found, np.full(len(test.found.images), n)) for n, test in enumerate(tests))
    images, *columns = map(np.concatenate, zip(*tables, strict=True))
    order = np.lexsort((-columns[2], images))
    images, *columns = (column[order] for column in (images, *columns))
    for image in np.unique(images[columns[2] >= score]):
        rows, there = (slice(*np.searchsorted(each, (image, image + 1)))
                       for each in (images, truth.images))  # fmt: skip
        boxes, labels, scores, owners = (column[rows] for column in columns)
        crowds = truth.ignored[there] & (truth.rule == "coco")
        near = overlaps(boxes, truth.boxes[there], crowds).max(1, initial=0)
        for k in range(np.count_nonzero(scores >= score)):
            if near[k] < NEAR:
                iou = overlaps(boxes, boxes[k : k + 1])[:, 0]
                near = np.maximum(near, iou)
                agree = (iou >= FOREGROUND) & (labels == labels[k])
                best = [scores[agree & (owners == n)].max(initial=0) for n in range(len(tests))]
                listed.append(Omission(image, labels[k], boxes[k], float(np.mean(best)),
                                       sum(each >= score for each in best)))
    known = np.bincount(truth.images, minlength=images.max(initial=-1) + 1)
    sums = np.bincount([o.image for o in listed], [o.score for o in listed], len(known))
    lacks = sums**2 / (sums + known).clip(1e-9)
    return sorted(listed, key=lambda o: (-lacks[o.image], o.image, -o.score))


def show_omissions(folder: Folder, tests: Sequence[Test], score: float,
                   most: int) -> tuple[str, list[str]]:
    """Return the first `most` omissions as HTML to tick, and notes for people; "" for none."""
    dataset, truth = tests[0].dataset, tests[0].judged.truth
    omissions = list_omissions([each.judged for each in tests], score)
    head = ("image", "class", "score", "tests", "x1", "y1", "x2", "y2")
    table = Table(head, [(dataset.ids[o.image], dataset.classes[o.label - 1], o.score, o.tests,
                          *o.box.tolist()) for o in omissions])  # fmt: skip
    parts, notes = f"<p>All of them: {folder.table('unlabelled', table)}</p>", []
    for image, group in groupby(omissions[:most], lambda o: o.image):
        objects = truth.boxes[truth.images == image]
        try:
            pixels = dataset.pull_image(image)
        except UserError as error:
            notes.append(str(error))
            continue
        drawn = ((o, draw_mistake(pixels, None, o.box, objects)) for o in group)
        figures = "".join(_figure(*each, dataset, len(tests)) for each in drawn)
        parts += (f"<article><h3>{escape(str(dataset.ids[image]))}</h3><p>{len(objects)} annotated"
                  f'</p><div class="gallery">{figures}</div></article>')
    if most and (left_out := omissions[most:]):
        notes.append(f"{len(left_out)} objects without annotation are not shown (--examples)")
    return parts * bool(omissions), notes


def _figure(o: Omission, image: np.ndarray, dataset: DetectionData, tests: int) -> str:
    name, (x1, y1, x2, y2) = dataset.classes[o.label - 1], o.box.tolist()
    text = escape(f"{name} {o.score:.2f}" + f", found by {o.tests} of {tests}" * (tests > 1))
    value = json.dumps({"image": str(dataset.ids[o.image]), "class": name, "score": o.score,
                        "bbox": [round(side, 2) for side in (x1, y1, x2 - x1, y2 - y1)]})
    return (f'<figure data-class="{o.label - 1}"><label><img alt="{text}" src="data:image/jpeg;'
            f'base64,{as_jpeg(image)}"><br><input type="checkbox" value="{escape(value)}"> {text}'
            "</label></figure>")


def merge(test: Test, accepted: Path, folder: Path) -> str:
    """Write annotation files with the objects that a page saved as accepted, and return a line.

    A file holds, in its format, what the data set's file of that name holds, and the new objects.
    Objects that are annotated by now are left out. folder: new or empty.
    """
    dataset, kind = test.dataset, test.results.values["dataset"]
    if dataset is None or kind not in WRITERS:
        raise UserError(f"{test.directory}: annotations of {kind} cannot be written, only of "
                        f"{', '.join(WRITERS)}; convert them" if dataset else test.notes[-1])
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files, which may be corrected by hand; give another "
                        "--output, or remove that folder")
    rows, truth, added = _read_accepted(accepted, test), test.judged.truth, []
    images, boxes = rows[:, 0].astype(int), extents(rows[:, 3:])
    for image in np.unique(images):
        near = overlaps(boxes, truth.boxes[truth.images == image]).max(1, initial=0)
        if (new := (images == image) & (near < NEAR)).any():
            source = Source(str(dataset.image_path(image)), str(dataset.ids[image]), "image")
            frame, corners = Frame(source, dataset.pull_image(image)), boxes[new] - (0, 0, 1, 1)
            added.append((image, Found(frame, corners, rows[new, 2], rows[new, 1].astype(int))))
    files, total = [*WRITERS[kind](dataset, added)], sum(len(found.labels) for _, found in added)
    for path, data in files:
        write(folder, relative(path, dataset.root).lstrip("./"), data)
    return (f"{folder}: {len(files)} annotation files with {total} new objects, and all of before "
            f"({len(rows) - total} are annotated by now); copy them over those in {dataset.root}")


def _read_accepted(path: Path, test: Test) -> np.ndarray:
    """Return a row of each accepted object: image, label, score, x, y, width, height."""
    images = {str(id): i for i, id in enumerate(test.dataset.ids)}
    labels = {name: label for label, name in enumerate(test.dataset.classes, 1)}
    records = read_json(path)
    try:
        rows = [(images[r["image"]], labels[r["class"]], r["score"], *r["bbox"]) for r in records]
        return np.asarray_chkfinite(rows, float).reshape(-1, 7)
    except Exception as error:  # of any content
        raise UserError(f"{path} does not list objects of {test.directory} ({error!r:.200}); save "
                        "it again from the page of that test") from error


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
    for image, found in added:
        path, names = dataset.annotations[image].path, np.array(dataset.classes)[found.labels - 1]
        if unknown := {*names.tolist()} - {*dataset.numbers}:
            raise UserError(f"{dataset.root}: add {min(unknown)} to the names that it declares")
        found = found._replace(labels=np.array([dataset.numbers[name] + 1 for name in names]))
        old = read_bytes(path).rstrip() if path.exists() else b""
        yield path, old + b"\n" * bool(old) + yolo_txt(found, "", dataset.classes)


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
