"""PASCAL VOC's XML annotations: one file an image."""

import functools
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from data.annotation import Annotation, around_rotated, turned
from data.classes import spelled
from utils.errors import UserError
from utils.files import decode, read_bytes

# Tags of shapes. A file that has one which is not read is refused, never taken for background.
_SHAPES = {"bndbox", "xmin", "robndbox", "polygon", "points", "bbox", "box", "polyline"}
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = {**dict.fromkeys(("", "0", "false", "unspecified"), False), "1": True, "true": True}


def read_annotation(path: Path) -> Annotation:
    """Read one VOC XML file. Tags other than <object>, <name> and <bndbox> are optional.

    Objects may lie at any depth, tags may have a namespace or capital letters. An object may have
    several <bndbox>: each is read as an object of its name. In place of <bndbox> it may have a
    polygon or a rotated box, which is read as the box around it.

    Raises:
        UserError: the file is missing or malformed, holds shapes that cannot be read, or is of
            several images; an object has no name or lacks a finite coordinate. The message names
            the file and the line, or the object, counted from 1.
    """
    root, where = read_xml(path), path
    names, boxes, difficult = [], [], []
    try:
        objects, others = _find_objects(root)
        first = {each.tag: each for each in reversed(others)}
        names_of_image = [_plain(first[tag].text) for tag in ("filename", "path") if tag in first]
        size = _read_size(first["size"]) if "size" in first else None
        for index, element in enumerate(objects, 1):
            where = f"{path}: object {index}"
            found = {_plain(child.text) for child in element.findall("name")}
            if len(found) > 1:
                raise ValueError(f"several names: {', '.join(sorted(found)):.60}; keep one")
            if not (name := "".join(found)):
                raise ValueError("no <name>")
            where += f' ("{name:.60}")'
            if (flag := _plain(element.findtext("difficult")).lower()) not in _FLAGS:
                raise ValueError(f'<difficult> is "{flag:.40}", expected 0 or 1')
            for box in _read_boxes(element):
                names.append(spelled(name))
                boxes.append(box)
                difficult.append(_FLAGS[flag])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    boxes = np.array(boxes, np.float64).reshape(-1, 4) - 1
    filename = next(filter(None, names_of_image), "").replace("\\", "/").rpartition("/")[2]
    return Annotation(path, size, tuple(names), boxes, np.array(difficult, bool), filename)


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file, in any encoding. Raises UserError for what is no XML."""
    data = read_bytes(path, "annotation", limit=2**27)
    declared = re.match(rb"""\s*<\?xml[^>]*\bencoding\s*=\s*["']([\w.:-]+)""", data)
    encoding = declared[1].decode().lower() if declared else "utf-8"
    if declared and re.match(r"(utf|ucs)-?_?(16|32|[24]$)", encoding):
        encoding = "utf-8"  # that is untrue: the declaration is readable
    text = decode(data, path, encoding)
    if "<!ENTITY" in text:
        raise UserError(f"{path}: declares XML entities, which no annotation needs; remove them")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}: malformed XML ({error})") from error
    except Exception as error:  # whatever else foreign bytes do to the parser
        raise UserError(f"{path}: malformed XML ({error})") from error


def _find_objects(root: ElementTree.Element) -> tuple[list[ElementTree.Element], ...]:
    """Return the <object> elements and those outside of them; refuse shapes out there."""
    if (tags := {element.tag for element in root.iter()}) != {*map(_local, tags)}:
        for element in root.iter():
            element.tag = _local(element.tag)
    objects, others = [], [root]
    for element in others:  # which grows
        for child in element:
            (objects if child.tag == "object" else others).append(child)
    if len(every := [*root.iter("object")]) > len(objects):
        k = next(k for k, each in enumerate(every, 1) if len([*each.iter("object")]) > 1)
        raise ValueError(f"object {k} holds another <object>; list them one by one")
    tags, keys = [each.tag for each in others], {key for each in others for key in each.keys()}
    if not objects or not _SHAPES.isdisjoint(tags) or not _SHAPES.isdisjoint(keys):
        for element in others:
            named = not _SHAPES.isdisjoint((element.tag, *element.keys()))
            if named or not objects and element is not root and _count_numbers(element) > 3:
                raise ValueError(f"<{element.tag}> outside an <object> cannot be read; write VOC's "
                                 "<object> with <name> and <bndbox>")
        if not objects and root.tag != "annotation":
            raise ValueError(f"not a VOC annotation (its root is <{root.tag}>); write VOC's "
                             "<annotation> with an <object> a box")
    for tag in ("filename", "size"):
        of_images = (each for each in others if each.tag != "source" and each.find(tag) is not None)
        if tags.count(tag) > 1 and len([*of_images]) > 1:
            raise ValueError("annotations of several images; write a file for each")
    # LabelMe keeps what was deleted.
    return [each for each in every if _plain(each.findtext("deleted")) != "1"], others


def _count_numbers(element: ElementTree.Element) -> int:
    """Return how many numbers an element has as text, attributes or children; a box has four."""
    texts = [element.text, *element.attrib.values(), *(child.text for child in element)]
    words = re.split(r"[\s,;]+", " ".join(text or "" for text in texts))
    return sum(re.fullmatch(r"[-+]?\d*\.?\d+", word) is not None for word in words)


@functools.lru_cache(4096)
def _local(tag: str) -> str:
    """Return a tag without namespace, in lower case."""
    return tag.rpartition("}")[2].lower()


def _read_boxes(element: ElementTree.Element) -> list[list[float]]:
    """Return the corners of each shape of an object, as the file has them."""
    boxes = element.findall("bndbox")
    if len(boxes) != len([*element.iter("bndbox")]) or not boxes:
        inside = [each for child in element if child.tag not in ("part", "parts")  # as of a person
                  for each in child.iter()]
        boxes = [each for each in inside if each.tag == "bndbox"]
    if boxes:
        rotation = next((each.findtext("value") for each in element.iterfind("attributes/attribute")
                         if each.findtext("name") == "rotation"), None)
        return [turned(_read_corners(box), rotation) for box in boxes]
    shapes = [each for each in inside if each.tag in ("robndbox", "polygon", "points")]
    if not shapes:
        raise ValueError("no <bndbox>")
    return [_enclose(shape) if shape.find("cx") is None else _read_rotated(shape)
            for shape in shapes]


def _read_corners(bndbox: ElementTree.Element) -> list[float]:
    texts = {child.tag: child.text or "" for child in bndbox}
    if len(texts) < len(bndbox):
        raise ValueError("<bndbox> has several corners of a name; write a <bndbox> a box")
    texts = texts or bndbox.attrib
    return [finite(texts.get(tag), tag) for tag in _CORNERS]


def _read_rotated(shape: ElementTree.Element) -> list[float]:
    """Return the box around a rotated one, as roLabelImg writes it: the angle is in radians."""
    values = [finite(shape.findtext(tag), tag) for tag in ("cx", "cy", "w", "h", "angle")]
    if abs(values[-1]) > 2 * math.pi:
        raise ValueError(f"<angle> is {values[-1]:g}, expected radians")
    return around_rotated(*values)


def _enclose(shape: ElementTree.Element) -> list[float]:
    """Return the box around a polygon of <x..> and <y..> tags, or of points "x,y"."""
    xs, ys = [], []
    for leaf in (each for each in shape.iter() if not len(each) and _plain(each.text)):
        if leaf.tag[0] in "xy":
            (xs if leaf.tag[0] == "x" else ys).append(finite(leaf.text, leaf.tag))
        elif leaf.tag in ("points", "polygon", "point", "pt"):
            values = [finite(word, leaf.tag) for word in re.split(r"[\s,;]+", _plain(leaf.text))]
            xs += values[::2]
            ys += values[1::2]
    if len(xs) < 2 or len(xs) != len(ys):
        raise ValueError(f"<{shape.tag}> has {len(xs)} x and {len(ys)} y coordinates; write a "
                         "<bndbox>")
    return [min(xs), min(ys), max(xs), max(ys)]


def finite(text: str | None, tag: str) -> float:
    """Return a number of pixels; raises ValueError for what is none, and names the ``tag``."""
    if text is None:
        raise ValueError(f"no <{tag}>")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 2**31:  # nan, too
        raise ValueError(f'<{tag}> is "{text.strip():.40}", expected a number of pixels')
    return value


def _read_size(size: ElementTree.Element) -> tuple[int, int] | None:
    tags = ("width", "height")
    width, height = (int(finite(_plain(size.findtext(tag)) or "0", tag)) for tag in tags)
    if min(width, height) < 0:
        raise ValueError(f"<size> is {width} x {height}; correct or remove it")
    return (width, height) if width and height else None


def _plain(text: str | None) -> str:
    return text.strip() if text else ""
