"""What detection writes as data sets to correct and to train on: VOC XML, YOLO text, COCO JSON.

Boxes are clipped to the image, and boxes outside it are dropped.
"""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.annotation import DATA_FOLDERS, check_ids
from data.image import IMAGE_SUFFIXES
from tools.outputs import Found, Writer, bbox, categories, inside, write, write_image
from tools.sources import Source
from utils.errors import UserError
from utils.files import read_bytes

_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Annotations(Writer):
    """A data set of the images and their annotations, also of images without objects.

    Images are linked, or copied where the disk has no links; frames of videos are written as JPEG.
    Raises UserError if the folder holds annotations already.
    """

    def __init__(self, folder: Path, kind: str, sources: Sequence[Source],
                 classes: Sequence[str]) -> None:
        self.place, self._images, self._suffix, self._encode = ANNOTATIONS[kind]
        self._out, self._folder = folder, folder / self.place
        if self._folder.is_dir() and any(self._folder.iterdir()):
            raise UserError(f"{self._folder} holds annotations, which may be corrected by hand; "
                            "give another --out, or remove that folder")
        self._classes, self._names = classes, label_names(sources)
        self._coco: list[tuple[dict, list[dict]]] | None = [] if kind == "coco" else None
        names = {"classes.txt": "".join(f"{name}\n" for name in classes)}
        if kind == "yolo":
            listed = json.dumps(list(classes), ensure_ascii=False)
            names["data.yaml"] = f"path: .\ntrain: images\nnames: {listed}\n"
        for name, text in names.items():
            write(folder, f"{kind}/{name}", text.encode())

    def add(self, found: Found) -> None:
        found, name = clipped(found), self._names[found.name]
        if found.frame.number is not None:
            name += f"/{found.frame.number:06d}"
        check_ids([name], [Path(found.name)], None)  # readers would refuse the whole data set
        image = self._keep_image(found, name)
        if self._coco is not None:
            self._coco.append(coco_records(found, image, self._classes))
        else:
            text = self._encode(found, image, self._classes)
            write(self._out, f"{self.place}{name}{self._suffix}", text)

    def close(self) -> None:
        """Write the one file of COCO, which numbers the images by name."""
        if self._coco is None:
            return
        images, objects = [], []
        for image, found in sorted(self._coco, key=lambda each: each[0]["file_name"]):
            images.append({"id": len(images) + 1, **image})
            objects += [{"image_id": len(images), **each} for each in found]
        objects = [{"id": k, **each} for k, each in enumerate(objects, 1)]
        data = {"categories": categories(self._classes), "images": images, "annotations": objects}
        write(self._out, f"{self.place}instances_default.json", json.dumps(data).encode())

    def _keep_image(self, found: Found, name: str) -> str:
        """Put the image into the data set, and return its name there."""
        suffix, is_image = os.path.splitext(found.name)[1], found.frame.number is None
        if not is_image or suffix.lower() not in IMAGE_SUFFIXES:
            suffix = ".png" if is_image else ".jpg"
            write_image(self._out, self._images + name + suffix, found.frame.image)
            return name + suffix
        path, file = inside(self._out, self._images + name + suffix), found.frame.source.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(os.path.realpath(file), path)
        except OSError:  # no links here, or an image of this name
            write(self._out, self._images + name + suffix, read_bytes(file, "image"))
        return name + suffix


def label_names(sources: Sequence[Source]) -> dict[str, str]:
    """Return the annotation file's name without suffix, for each source by name.

    It is the image's name without suffix, as readers expect. Videos keep the suffix, and so do
    images that would else share a file (``a.jpg`` and ``a.png``, ``a.jpg.png`` and ``a.jpg``).
    A folder whose name means something to readers, such as ``images``, gets a ``_`` behind it.
    """
    names = _plain([source.name for source in sources])
    stems = [os.path.splitext(name)[0] for name in names]
    keys = [stem.casefold() for stem in stems]  # some file systems ignore case
    times = Counter(keys + [name.casefold() for name in names])
    return {source.name: stem if source.kind == "image" and times[key] == 1 else name
            for source, name, stem, key in zip(sources, names, stems, keys, strict=True)}


def _plain(names: Sequence[str]) -> list[str]:
    """Return names of images without folders that mean something to readers."""
    paths = [name.split("/") for name in names]
    new = {folder: folder for *folders, _ in paths for folder in folders}
    taken = {folder.casefold() for folder in new}
    for folder in new:
        while new[folder].casefold() in DATA_FOLDERS | (taken - {folder.casefold()}):
            new[folder] += "_"
    return ["/".join([*map(new.get, folders), file]) for *folders, file in paths]


def voc_xml(found: Found, image: str, classes: Sequence[str]) -> bytes:
    """Return a VOC annotation of `clipped` detections, with a ``<score>`` per object.

    Boxes are rounded to whole pixels, and are at least two pixels wide and high: readers drop a
    box of one pixel as empty.
    """
    low = np.minimum(found.boxes[:, :2].round(), np.array(found.size) - 2)
    high = np.maximum(found.boxes[:, 2:].round(), low + 1)
    boxes = np.hstack([low, high]).astype(int)
    return voc_annotation(image, found.size, [
        (classes[label - 1], box, {"truncated": 0, "difficult": 0, "score": f"{score:.5f}"})
        for box, score, label in zip(boxes, found.scores, found.labels, strict=True)
    ])


def voc_annotation(name: str, size: tuple[int, int],
                   objects: Iterable[tuple[str, Sequence[int], Mapping[str, object]]]) -> bytes:
    """Return the VOC XML of an image file ``name`` (relative, with "/") of (width, height).

    objects: class name, box in whole pixels, 0-based inclusive (VOC's are 1-based), and further
        tags. Characters that XML does not allow become U+FFFD.
    """
    root = ElementTree.Element("annotation")
    folder, _, file = name.rpartition("/")
    _put(root, folder=folder, filename=file)
    _put(ElementTree.SubElement(root, "size"), width=size[0], height=size[1], depth=3)
    _put(root, segmented=0)
    for label, box, tags in objects:
        element = ElementTree.SubElement(root, "object")
        _put(element, name=label, pose="Unspecified", **tags)
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        _put(ElementTree.SubElement(element, "bndbox"), **{key: v + 1 for key, v in corners})
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8") + b"\n"


def _put(parent: ElementTree.Element, **texts: object) -> None:
    for tag, text in texts.items():
        ElementTree.SubElement(parent, tag).text = _NOT_IN_XML.sub("\ufffd", str(text))


def yolo_txt(found: Found, image: str, classes: Sequence[str], polygons: bool = False) -> bytes:
    """Return a line per `clipped` box: class from 0, then centre, width, height, or corners.

    All values but the class are relative to the image.
    """
    edges = (found.boxes + (0, 0, 1, 1)) / (*found.size, *found.size)
    low, high = edges[:, :2], edges[:, 2:]
    corners, box = edges[:, [0, 1, 2, 1, 2, 3, 0, 3]], np.hstack([(low + high) / 2, high - low])
    rows = zip(found.labels, corners if polygons else box, strict=True)
    lines = [f"{label - 1} {' '.join(f'{value:.6f}' for value in row)}\n" for label, row in rows]
    return "".join(lines).encode()


def clipped(found: Found) -> Found:
    """Return the boxes clipped to the image, without those that are then under two pixels."""
    width, height = found.size
    boxes = found.boxes.clip(0, np.array([width, height, width, height]) - 1)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Found(found.frame, boxes[inside], found.scores[inside], found.labels[inside])


def coco_records(found: Found, image: str, classes: Sequence[str],
                 ids: Sequence[int] = ()) -> tuple[dict, list[dict]]:
    """Return the records of an image and its `clipped` objects, without numbers.

    ids: of the classes; none: as `categories` numbers them.
    """
    ids, records = ids or [category["id"] for category in categories(classes)], []
    for box, label in zip(found.boxes, found.labels, strict=True):
        sides = bbox(box)
        records.append({"category_id": ids[label - 1], "bbox": sides, "iscrowd": 0,
                        "area": round(sides[2] * sides[3], 2)})
    return {"file_name": image, "width": found.size[0], "height": found.size[1]}, records


ANNOTATIONS = {"voc": ("voc/Annotations/", "voc/JPEGImages/", ".xml", voc_xml),
               "yolo": ("yolo/labels/", "yolo/images/", ".txt", yolo_txt),
               "coco": ("coco/annotations/", "coco/images/", ".json", coco_records)}
"""Kind -> folder, folder of the images, suffix, and what annotates an image."""
