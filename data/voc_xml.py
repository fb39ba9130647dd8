"""PASCAL VOC's XML annotations: one file an image."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from data.annotation import Annotation
from utils.errors import UserError
from utils.files import decode, read_bytes

# Tags of shapes. A file that has one which is not read is refused, never taken for background.
_SHAPES = {"bndbox", "xmin", "robndbox", "polygon", "points", "bbox", "box", "polyline"}
_PARTS = ("part", "parts")  # of an object, such as a person's head
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_annotation(path: str | Path) -> Annotation:
    """Read one VOC XML file. Tags other than <object>, <name> and <bndbox> are optional.

    Objects may lie at any depth, tags may have a namespace or capital letters. An object may have
    several <bndbox>: each is read as an object of its name. In place of <bndbox> it may have a
    polygon or a rotated box, which is read as the box around it.

    Raises:
        UserError: the file is missing or malformed, holds shapes that cannot be read, or is of
            several images; an object has no name or lacks a finite coordinate. The message names
            the file and the line, or the object, counted from 1.
    """
    path = Path(path)
    objects, others = _find_objects(path, read_xml(path))
    names, boxes, difficult = [], [], []
    for index, element in enumerate(objects, 1):
        where = f"{path}: object {index}"
        found = {_plain(name.text) for name in element.findall("name")}
        if len(found) > 1:
            raise UserError(f"{where} has several names: {', '.join(sorted(found)):.60}; keep one")
        if not (name := "".join(found)):
            raise UserError(f"{where} has no <name>")
        where += f' ("{name:.60}")'
        read = _read_boxes(element, where)
        names += [unicodedata.normalize("NFC", name)] * len(read)
        boxes += read
        difficult += [_read_difficult(element, where)] * len(read)
    boxes = np.array(boxes, np.float64).reshape(-1, 4) - 1
    return Annotation(path, _read_size(path, others), tuple(names), boxes,
                      np.array(difficult, bool), _read_filename(others))


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file, in any encoding. Raises UserError for what is no XML."""
    data = read_bytes(path, "annotation", limit=2**27)
    declared = re.match(rb"""\s*<\?xml[^>]*\bencoding\s*=\s*["']([\w.:-]+)""", data)
    encoding = declared[1].decode() if declared else "utf-8"
    if re.match(r"(?i)(utf|ucs)-?_?(16|32|[24]$)", encoding):  # untrue: the declaration is readable
        encoding = "utf-8"
    text = decode(data, path, encoding)
    if "<!ENTITY" in text:
        raise UserError(f"{path}: declares XML entities, which no annotation needs; remove them")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: malformed XML ({error})") from error
    except Exception as error:  # whatever else foreign bytes do to the parser
        raise UserError(f"{path}: malformed XML ({error})") from error


def _find_objects(path: Path, root: ElementTree.Element) -> tuple[list[ElementTree.Element], ...]:
    """Return the <object> elements and those outside of them; refuse shapes out there."""
    elements = list(root.iter())
    written = [element.tag for element in elements]
    tags = [*map(_local, written)]
    if tags != written:
        for element, tag in zip(elements, tags, strict=True):
            element.tag = tag
    objects, others, end = [], [], 0
    for start in (k for k, tag in enumerate(tags) if tag == "object"):
        if start < end:
            raise UserError(f"{path}: object {len(objects)} holds another <object>; list them one "
                            "by one")
        others += elements[end:start]
        end = start + len(list(elements[start].iter()))
        objects.append(elements[start])
    others += elements[end:]
    for element in others:
        keys = element.keys()
        named = element.tag in _SHAPES or "xmin" in keys or "points" in keys
        if named or not objects and element is not root and _count_numbers(element) > 3:
            raise UserError(f"{path}: <{element.tag}> outside an <object> cannot be read; write "
                            "VOC's <object> with <name> and <bndbox>")
    if not objects and tags[0] != "annotation":
        raise UserError(f"{path}: not a VOC annotation (its root is <{tags[0]}>); write VOC's "
                        "<annotation> with an <object> a box")
    for tag in ("filename", "size"):
        of_images = (each for each in others if each.tag != "source" and each.find(tag) is not None)
        if tags.count(tag) > 1 and len([*of_images]) > 1:
            raise UserError(f"{path}: annotations of several images; write a file for each")
    # LabelMe keeps what was deleted.
    return [each for each in objects if _text(each, "deleted") != "1"], others


def _count_numbers(element: ElementTree.Element) -> int:
    """Return how many numbers an element has as text, attributes or children; a box has four."""
    texts = [element.text, *element.attrib.values(), *(child.text for child in element)]
    words = re.split(r"[\s,;]+", " ".join(text or "" for text in texts))
    return sum(re.fullmatch(r"[-+]?\d*\.?\d+", word) is not None for word in words)


@functools.lru_cache(4096)
def _local(tag: str) -> str:
    """Return a tag without namespace, in lower case."""
    return tag.rpartition("}")[2].lower()


def _read_boxes(element: ElementTree.Element, where: str) -> list[list[float]]:
    """Return the corners of each shape of an object, as the file has them."""
    boxes = element.findall("bndbox")
    if not boxes or len(boxes) < len(list(element.iter("bndbox"))):
        inside = [each for child in element if child.tag not in _PARTS for each in child.iter()]
        boxes = [each for each in inside if each.tag == "bndbox"]
    if boxes:
        return [_read_corners(box, where) for box in boxes]
    shapes = [each for each in inside if each.tag in ("robndbox", "polygon", "points")]
    if not shapes:
        raise UserError(f"{where} has no <bndbox>")
    return [
        _enclose(shape, where) if shape.find("cx") is None else _read_rotated(shape, where)
        for shape in shapes
    ]


def _read_corners(bndbox: ElementTree.Element, where: str) -> list[float]:
    texts = {child.tag: child.text or "" for child in bndbox}
    if len(texts) < len(bndbox):
        raise UserError(f"{where}: <bndbox> has several corners of a name; write a <bndbox> a box")
    return [_finite(texts.get(tag, bndbox.get(tag)), tag, where) for tag in _CORNERS]


def _read_rotated(shape: ElementTree.Element, where: str) -> list[float]:
    """Return the box around a rotated one, as roLabelImg writes it: the angle is in radians."""
    tags = ("cx", "cy", "w", "h", "angle")
    cx, cy, w, h, angle = (_finite(shape.findtext(tag), tag, where) for tag in tags)
    if abs(angle) > 2 * math.pi:
        raise UserError(f"{where}: <angle> is {angle:g}, expected radians")
    sin, cos = abs(math.sin(angle)), abs(math.cos(angle))
    x, y = (w * cos + h * sin) / 2, (w * sin + h * cos) / 2
    return [cx - x, cy - y, cx + x, cy + y]


def _enclose(shape: ElementTree.Element, where: str) -> list[float]:
    """Return the box around a polygon of <x..> and <y..> tags, or of points "x,y"."""
    xs, ys = [], []
    for leaf in (each for each in shape.iter() if not len(each) and _plain(each.text)):
        if leaf.tag[0] in "xy":
            (xs if leaf.tag[0] == "x" else ys).append(_finite(leaf.text, leaf.tag, where))
        elif leaf.tag in ("points", "polygon", "point", "pt"):
            values = re.split(r"[\s,;]+", _plain(leaf.text))
            xs += [_finite(value, leaf.tag, where) for value in values[::2]]
            ys += [_finite(value, leaf.tag, where) for value in values[1::2]]
    if len(xs) < 2 or len(xs) != len(ys):
        raise UserError(f"{where}: <{shape.tag}> has {len(xs)} x and {len(ys)} y coordinates; "
                        "write a <bndbox>")
    return [min(xs), min(ys), max(xs), max(ys)]


def _finite(text: str | None, tag: str, where: str) -> float:
    if text is None:
        raise UserError(f"{where} has no <{tag}>")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 2**31:  # nan, too
        raise UserError(f'{where}: <{tag}> is "{text.strip()[:40]}", expected a number of pixels')
    return value


def _read_difficult(element: ElementTree.Element, where: str) -> bool:
    flag = _text(element, "difficult").lower()
    if flag not in ("", "0", "1", "false", "true", "unspecified"):
        raise UserError(f'{where}: <difficult> is "{flag[:40]}", expected 0 or 1')
    return flag in ("1", "true")


def _read_size(path: Path, elements: list[ElementTree.Element]) -> tuple[int, int] | None:
    for size in (each for each in elements if each.tag == "size"):
        tags = ("width", "height")
        width, height = (int(_finite(_text(size, tag) or "0", tag, str(path))) for tag in tags)
        if min(width, height) < 0:
            raise UserError(f"{path}: <size> is {width} x {height}; correct or remove it")
        return (width, height) if width and height else None
    return None


def _read_filename(elements: list[ElementTree.Element]) -> str:
    """Return the name of the image file without folders, "" if the annotation has none."""
    for tag in ("filename", "path"):
        for element in elements:
            if element.tag == tag and _plain(element.text):
                return re.split(r"[/\\]", _plain(element.text))[-1]
    return ""


def _text(parent: ElementTree.Element, tag: str) -> str:
    return _plain(parent.findtext(tag))


def _plain(text: str | None) -> str:
    return (text or "").strip()
