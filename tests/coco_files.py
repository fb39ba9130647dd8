"""Small COCO data sets, written for tests."""

import json

import cv2
import numpy as np

WIDTH, HEIGHT = 60, 40
CATEGORIES = [{"id": 7, "name": "kite"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "oar"}]


def annotation(id, image_id, bbox, category_id=3, **more):
    area = bbox[2] * bbox[3]
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, "area": area,
            "iscrowd": 0, **more}  # fmt: skip


def write_set(root, file, folder, names, annotations=None, size=(WIDTH, HEIGHT), **document):
    """One annotation file and its images, plain and of the grey level of their id.

    names: {image id: file name}.
    """
    width, height = size
    images = [{"id": id, "file_name": name, "width": width, "height": height}
              for id, name in names.items()]
    document = {"images": images, "categories": CATEGORIES, **document}
    if annotations is not None:
        document["annotations"] = annotations
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / file).write_text(json.dumps(document))
    (root / folder).mkdir(parents=True, exist_ok=True)
    for id, name in names.items():
        image = np.full((height, width, 3), id % 256, np.uint8)
        (root / folder / name).write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return root


def perfect(dataset, move=0):
    """Return the targets as detections of score 1, all moved by so many pixels."""
    return [{"boxes": t[:, :4] + np.float32(move), "scores": np.ones(len(t), np.float32),
             "labels": t[:, 4].astype(int)} for t in map(dataset.target, range(len(dataset)))]


def write_val2017(root, annotations, ids=(42, 9), **document):
    names = {id: f"{id:012d}.jpg" for id in ids}
    return write_set(root, "instances_val2017.json", "val2017", names, annotations, **document)
