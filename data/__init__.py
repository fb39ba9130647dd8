"""Data sets by name. Readers are imported when they are asked for, not before: a preset from
``data.config`` needs neither OpenCV nor pycocotools."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "COCODetection": "data.coco",
    "VOCDetection": "data.voc0712",
    "VOC_CLASSES": "data.config",
    "detection_collate": "data.loading",
}

__all__ = sorted([*_EXPORTS, "build_dataset"])


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def build_dataset(name: str, root: str, image_sets, classes=None, crowds: bool = True):
    """The data set ``name`` (VOC or COCO) under ``root``.

    ``image_sets`` are (year, set) pairs, year ``None`` for a folder without devkit years.
    ``classes`` are the names to read; ``None`` means what the data set declares or holds.
    ``crowds`` (COCO): whether crowds are targets like other boxes.
    """
    if name == "VOC":
        from data.voc0712 import VOCDetection

        return VOCDetection(root, image_sets, classes=classes)
    if name == "COCO":
        from data.coco import COCODetection

        return COCODetection(root, image_sets, classes=classes, crowds=crowds)
    raise ValueError(f"unknown data set {name!r}, choose from VOC, COCO")
