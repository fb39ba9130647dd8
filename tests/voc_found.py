"""Detections of VOC's classes as tests write them down, and their score."""

import numpy as np

from data.judge import Found
from data.voc_eval import evaluate_voc, voc_truth


def by_class(*tables) -> Found:
    """Return detections from rows (image, score, x1, y1, x2, y2), ends inside, of each class."""
    tables = [np.array(rows, np.float64).reshape(-1, 6) for rows in tables]
    rows, labels = np.concatenate(tables), np.repeat(np.arange(len(tables)), [*map(len, tables)])
    return Found(rows[:, 0].astype(int), rows[:, 2:] + (0, 0, 1, 1), labels + 1, rows[:, 1])


def of_class(found: Found, label: int) -> Found:
    """Return the detections of a class; its boxes have both ends inside."""
    rows = found.labels == label
    return Found(*(each[rows] for each in found))._replace(boxes=found.boxes[rows] - (0, 0, 1, 1))


def score(found, annotations, classes, iou=0.5) -> dict:
    return evaluate_voc(found, voc_truth(annotations, classes), classes, len(annotations), iou)
