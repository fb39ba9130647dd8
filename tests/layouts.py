"""Twelve small images, written in every layout that labelling tools export.

Files, keys and their order are those of the tools. The texts are written here, by no code that the
project or the tools read or write with. `IMAGES` is the truth that all layouts hold.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

CLASSES = ("zebra", "red box", "cell")
# File name -> width, height and objects (class, x1, y1, x2, y2), pixels from 0, both ends inside.
IMAGES = {
    "north_01.jpg": (96, 72, [("cell", 4, 6, 43, 41), ("zebra", 50, 20, 89, 69)]),
    "north_02.jpg": (96, 72, [("red box", 0, 0, 95, 71)]),
    "north 03.jpg": (72, 96, [("cell", 10, 40, 31, 90), ("cell", 40, 5, 70, 33)]),
    "south_01.jpg": (96, 72, []),
    "south_02.png": (96, 72, [("zebra", 33, 11, 60, 70), ("red box", 5, 5, 20, 66)]),
    "east.1.jpg": (96, 72, [("cell", 60, 30, 95, 71)]),
    "east.2.jpg": (80, 60, [("zebra", 1, 2, 30, 58), ("zebra", 40, 2, 69, 58)]),
    "east.3.jpg": (96, 72, [("red box", 22, 13, 71, 52), ("cell", 75, 1, 94, 18)]),
    "west_01.jpg": (96, 72, [("cell", 7, 7, 46, 48), ("red box", 51, 9, 90, 60)]),
    "west_02.jpg": (96, 72, []),
    "west_03.jpg": (96, 72, [("zebra", 15, 10, 64, 59)]),
    "west_04.jpg": (96, 72, [("red box", 30, 31, 77, 66), ("zebra", 2, 2, 25, 44)]),
}
TRAIN, VALID, TEST = (list(IMAGES)[part] for part in (slice(8), slice(8, 10), slice(10, 12)))
ALL = [*TRAIN, *VALID, *TEST]
_COLOURS = {"zebra": (230, 230, 230), "red box": (30, 20, 220), "cell": (160, 90, 60)}


@cache
def image_bytes(name: str) -> bytes:
    width, height, objects = IMAGES[name]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    image = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    for label, x1, y1, x2, y2 in objects:
        cv2.rectangle(image, (x1, y1), (x2, y2), _COLOURS[label], -1)
    return cv2.imencode(Path(name).suffix, image)[1].tobytes()


def write_images(folder: Path, names: Iterable[str], rename: Callable[[str], str] = str) -> None:
    for name in names:
        _write(folder / rename(name), image_bytes(name))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def roboflow_name(name: str) -> str:
    """Roboflow puts the suffix into the name, and adds a digest."""
    digest = hashlib.md5(name.encode()).hexdigest()
    suffix = Path(name).suffix
    return f"{name.removesuffix(suffix).replace(' ', '-')}_{suffix[1:]}.rf.{digest}{suffix}"


def voc_xml(title: str, objects: Iterable[tuple], size: tuple[int, int] | None,
            path: str = "", number: str = "{}", extra: str = "",
            order: str = "xmin ymin xmax ymax") -> str:
    """objects: (class, corners as the XML has them[, difficult]); extra: text in every object."""
    text = (
        f"<annotation>\n\t<folder>shapes</folder>\n\t<filename>{title}</filename>\n"
        + f"\t<path>{path}</path>\n" * bool(path)
        + "\t<source>\n\t\t<database>Unknown</database>\n\t</source>\n"
    )
    if size:
        text += f"\t<size><width>{size[0]}</width><height>{size[1]}</height></size>\n"
    for label, box, *difficult in objects:
        values = dict(zip("xmin ymin xmax ymax".split(), box, strict=True))
        corners = "".join(f"<{tag}>{number.format(values[tag])}</{tag}>" for tag in order.split())
        text += (
            f"\t<object>\n\t\t<name>{label}</name>\n\t\t<pose>Unspecified</pose>\n"
            f"\t\t<difficult>{int(any(difficult))}</difficult>\n{extra}"
            f"\t\t<bndbox>{corners}</bndbox>\n\t</object>\n"
        )
    return f"{text}</annotation>\n"


def _xml(folder: Path, names: Iterable[str], rename: Callable[[str], str] = str, **style) -> None:
    for name in names:
        title, (width, height, objects) = rename(name), IMAGES[name]
        values = [(label, [value + 1 for value in box]) for label, *box in objects]
        text = voc_xml(title, values, (width, height), f"/home/ann/shapes/{title}", **style)
        _write(folder / f"{title.rpartition('.')[0]}.xml", text)


def _voc(images: str, annotations: str, root: Path,
         lists: dict[str, list[str]] | None = None, **style) -> None:
    write_images(root / images, ALL)
    _xml(root / annotations, ALL, **style)
    for set_name, names in (lists or {}).items():
        text = "".join(f"{name.rpartition('.')[0]}\n" for name in names)
        _write(root / "ImageSets" / "Main" / f"{set_name}.txt", text)


def _cvat_voc(root: Path) -> None:
    attributes = (
        "\t\t<occluded>0</occluded>\n\t\t<attributes>\n\t\t\t<attribute><name>rotation</name>"
        "<value>0.0</value></attribute>\n\t\t</attributes>\n"
    )
    _voc("JPEGImages", "Annotations", root, {"default": ALL}, number="{:.1f}", extra=attributes)
    for name in ("south_01", "west_02"):  # CVAT writes no XML of an image without objects
        (root / "Annotations" / f"{name}.xml").unlink()
    rows = [f"{label}:{i},{i},128::\n" for i, label in enumerate(("background", *CLASSES))]
    _write(root / "labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(rows))


def _roboflow_sets(root: Path) -> Iterable[tuple[Path, list[str]]]:
    for file in ("README.dataset.txt", "README.roboflow.txt"):
        _write(root / file, "shapes - v1\n\nExported via roboflow.com\n")
    for folder, names in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        yield root / folder, names


def _roboflow_voc(root: Path) -> None:
    for folder, names in _roboflow_sets(root):
        write_images(folder, names, roboflow_name)
        _xml(folder, names, roboflow_name, extra="\t\t<occluded>0</occluded>\n",
             order="xmin xmax ymin ymax")  # fmt: skip


def coco_json(names: Iterable[str], file_name: Callable[[str], str] = str, first: int = 1,
              number: type = int, **more: dict) -> dict:
    """first: the first id of everything; more: keys for each record of a kind."""
    document: dict = {"info": {"description": ""}, "licenses": [], "categories": [], "images": [],
                      "annotations": []}  # fmt: skip
    for i, label in enumerate(CLASSES, first):
        document["categories"].append({"id": i, "name": label, **more.get("category", {})})
    for i, name in enumerate(names, first):
        width, height, objects = IMAGES[name]
        image = {"id": i, "width": width, "height": height, "file_name": file_name(name)}
        document["images"].append(image | more.get("image", {}))
        for label, x1, y1, x2, y2 in objects:
            w, h = x2 - x1 + 1, y2 - y1 + 1
            document["annotations"].append({
                "id": first + len(document["annotations"]), "image_id": i,
                "category_id": first + CLASSES.index(label), "segmentation": [],
                "area": number(w * h), "bbox": [number(v) for v in (x1, y1, w, h)], "iscrowd": 0,
                **more.get("annotation", {}),
            })  # fmt: skip
    return document


def _coco(root: Path) -> None:
    for set_name, names in (("train", TRAIN), ("val", VALID + TEST)):
        write_images(root / set_name, names)
        document = coco_json(names, category={"supercategory": "thing"})
        _write(root / f"annotations/instances_{set_name}.json", json.dumps(document))


def _cvat_coco(subsets: dict[str, list[str]], root: Path) -> None:
    """Each file numbers its images from 1."""
    for set_name, names in subsets.items():
        folder = root / "images" if set_name == "default" else root / "images" / set_name
        write_images(folder, names)
        document = coco_json(
            names, number=float, category={"supercategory": ""},
            image={"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0},
            annotation={"attributes": {"occluded": False, "rotation": 0.0}},
        )
        _write(root / "annotations" / f"instances_{set_name}.json", json.dumps(document))


def _roboflow_coco(root: Path) -> None:
    """Category 0 is the project itself, without a box."""
    for folder, names in _roboflow_sets(root):
        write_images(folder, names, roboflow_name)
        document = coco_json(names, roboflow_name, category={"supercategory": "shapes"},
                             image={"license": 1, "date_captured": "2024-05-01T12:00:00+00:00"})
        root_category = {"id": 0, "name": "shapes", "supercategory": "none"}
        document["categories"].insert(0, root_category)
        _write(folder / "_annotations.coco.json", json.dumps(document))


def _label_studio_coco(root: Path) -> None:
    """Numbers begin with 0, boxes are floats, and file names begin with the folder."""
    write_images(root / "images", ALL)
    document = coco_json(ALL, "images/{}".format, 0, float, annotation={"ignore": 0})
    document["info"] = {"year": 2024, "version": "1.0", "contributor": "Label Studio"}
    _write(root / "result.json", json.dumps(document, indent=2))


def _cvat(subsets: dict[str, list[str]], root: Path) -> None:
    """subsets: what the attribute says; "" for a task, which has none."""
    labels = "".join(f"<label><name>{c}</name><type>rectangle</type></label>" for c in CLASSES)
    text = (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n'
        f"  <meta>\n    <task>\n      <name>shapes</name>\n      <labels>{labels}</labels>\n"
        "    </task>\n    <dumped>2024-05-01 12:00:00.000000+00:00</dumped>\n  </meta>\n"
    )
    names = [(subset, name) for subset, each in subsets.items() for name in each]
    for i, (subset, name) in enumerate(names):
        width, height, objects = IMAGES[name]
        said = f'subset="{subset}" task_id="7" ' if subset else ""
        text += f'  <image id="{i}" name="{name}" {said}width="{width}" height="{height}">\n'
        for label, x1, y1, x2, y2 in objects:
            text += (
                f'    <box label="{label}" source="manual" occluded="0" xtl="{x1:.2f}" '
                f'ytl="{y1:.2f}" xbr="{x2 + 1:.2f}" ybr="{y2 + 1:.2f}" z_order="0">\n    </box>\n'
            )
        text += "  </image>\n"
    write_images(root / "images", ALL)
    _write(root / "annotations.xml", f"{text}</annotations>\n")


def _cvat_files(root: Path) -> None:
    """As Datumaro writes CVAT's XML."""
    for subset, names in _SUBSETS.items():
        _cvat({"": names}, root)
        (root / "annotations.xml").rename(root / f"{subset}.xml")


def yolo_txt(name: str, polygons: bool = False) -> str:
    """polygons: outlines of six points that touch each side of the box."""
    width, height, objects = IMAGES[name]
    lines = []
    for label, x1, y1, x2, y2 in objects:
        left, top, right, bottom = x1 / width, y1 / height, (x2 + 1) / width, (y2 + 1) / height
        x, y = (left + right) / 2, (top + bottom) / 2
        values = [x, y, right - left, bottom - top]
        if polygons:
            values = [x, top, right, y, right, bottom, x, bottom, left, y, left, top]
        lines.append(" ".join([str(CLASSES.index(label)), *(f"{v:.6f}" for v in values)]))
    return "\n".join(lines) + "\n" * bool(lines)


def _yolo(images: Path, labels: Path, names: Iterable[str], rename: Callable[[str], str] = str,
          **how) -> None:
    write_images(images, names, rename)
    for name in names:
        _write(labels / f"{rename(name).rpartition('.')[0]}.txt", yolo_txt(name, **how))


def _yolo_folders(head: str, names: str, root: Path, **how) -> None:
    for set_name, each in (("train", TRAIN), ("val", VALID + TEST)):
        _yolo(root / "images" / set_name, root / "labels" / set_name, each, **how)
    yaml = f"{head}train: images/train  # relative to path\nval: images/val\ntest:\n\n{names}\n"
    _write(root / "data.yaml", yaml)


_YAML = "YOLO (data.yaml)"
_LIST = f"nc: {len(CLASSES)}\nnames: {list(CLASSES)}"
_MAP = "names:\n" + "\n".join(f"  {i}: {label}" for i, label in enumerate(CLASSES))


def _roboflow_yolo(root: Path) -> None:
    for folder, names in _roboflow_sets(root):
        _yolo(folder / "images", folder / "labels", names, roboflow_name)
    sets = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    _write(root / "data.yaml", f"{sets}\n{_LIST}\n\nroboflow:\n  project: shapes\n")


def _yolo_classes(images: str, labels: str, root: Path) -> None:
    """Without data.yaml."""
    _yolo(root / images, root / labels, ALL)
    _write(root / "classes.txt", "\n".join(CLASSES) + "\n")
    _write(root / "notes.json", json.dumps({"info": {"contributor": "Label Studio"}}))


def _yolo_lists(subsets: dict[str, list[str]], root: Path) -> None:
    """As CVAT exports a task for Ultralytics, or a project."""
    for subset, names in subsets.items():
        _yolo(root / "images" / subset, root / "labels" / subset, names)
        _write(root / f"{subset}.txt", "".join(f"images/{subset}/{name}\n" for name in names))
    lists = "".join(f"{subset}: {subset}.txt\n" for subset in subsets)
    _write(root / "data.yaml", f"path: ./\n{lists}{_MAP}\n")


def _darknet(root: Path) -> None:
    """As CVAT's YOLO 1.1 and Datumaro."""
    for subset, names in _SUBSETS.items():
        _yolo(root / f"obj_{subset}_data", root / f"obj_{subset}_data", names)
        lines = "".join(f"data/obj_{subset}_data/{name}\n" for name in names)
        _write(root / f"{subset}.txt", lines)
    _write(root / "obj.names", "\n".join(CLASSES) + "\n")
    _write(root / "obj.data", "classes = 3\nTrain = data/Train.txt\nnames = data/obj.names\n")


class Layout(NamedTuple):
    """write: into a folder; dataset, name: what `data.find_layout` finds there.

    sets: image sets to train on and to test on where the layout declares them. rename: images.
    """

    write: Callable[[Path], None]
    dataset: str
    name: str
    sets: tuple[list[str], list[str]] | None = None
    rename: Callable[[str], str] = str


_LISTS = {"trainval": TRAIN + VALID, "test": TEST}
_SUBSETS = {"Train": TRAIN, "Validation": VALID, "Test": TEST}
_IN_FOLDER = "VOC XML in Annotations/"
_TWO, _ROBOFLOW = (TRAIN, VALID + TEST), ((TRAIN, VALID), roboflow_name)
LAYOUTS = {
    "voc": Layout(partial(_voc, "JPEGImages", "Annotations", lists=_LISTS), "VOC", _IN_FOLDER,
                  (TRAIN + VALID, TEST)),
    "xml-folders": Layout(partial(_voc, "images", "Annotations"), "VOC", _IN_FOLDER),
    "labelimg": Layout(partial(_voc, "", ""), "VOC", "VOC XML beside images"),
    "cvat-voc": Layout(_cvat_voc, "VOC", "CVAT VOC"),
    "roboflow-voc": Layout(_roboflow_voc, "VOC", "VOC XML, a folder a set", *_ROBOFLOW),
    "coco": Layout(_coco, "COCO", "COCO", _TWO),
    "cvat-coco": Layout(partial(_cvat_coco, {"default": ALL}), "COCO", "COCO"),
    "roboflow-coco": Layout(_roboflow_coco, "COCO", "Roboflow COCO", *_ROBOFLOW),
    "label-studio-coco": Layout(_label_studio_coco, "COCO", "Label Studio COCO"),
    "cvat": Layout(partial(_cvat, {"": ALL}), "CVAT", "CVAT for images"),
    "cvat-project": Layout(partial(_cvat, _SUBSETS), "CVAT", "CVAT for images", (TRAIN, VALID)),
    "cvat-files": Layout(_cvat_files, "CVAT", "CVAT for images", (TRAIN, VALID)),
    "cvat-coco-project": Layout(partial(_cvat_coco, _SUBSETS), "COCO", "COCO", (TRAIN, VALID)),
    "yolo-list": Layout(partial(_yolo_folders, "", _LIST), "YOLO", _YAML, _TWO),
    "yolo-map": Layout(partial(_yolo_folders, "path: ../datasets/shapes\n", _MAP), "YOLO", _YAML,
                       _TWO),
    "yolo-polygons": Layout(partial(_yolo_folders, "path: .\n", _MAP, polygons=True), "YOLO",
                            _YAML, _TWO),
    "yolo-roboflow": Layout(_roboflow_yolo, "YOLO", _YAML, *_ROBOFLOW),
    "yolo-beside": Layout(partial(_yolo_classes, "", ""), "YOLO",
                          "YOLO (images and labels beside)"),
    "yolo-label-studio": Layout(partial(_yolo_classes, "images", "labels"), "YOLO",
                                "YOLO (images and labels)"),
    "yolo-lists": Layout(partial(_yolo_lists, {"train": ALL}), "YOLO", _YAML),
    "yolo-project": Layout(partial(_yolo_lists, _SUBSETS), "YOLO", _YAML, (TRAIN, VALID)),
    "darknet": Layout(_darknet, "YOLO", "YOLO (images and labels beside)", (TRAIN, VALID)),
}  # fmt: skip
