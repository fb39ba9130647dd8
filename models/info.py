"""What a checkpoint says of itself: which detector it is, of which classes, trained on what.

``saved`` is a checkpoint as ``utils.checkpoint.load_checkpoint`` returns it, ``path`` its file.
``classes`` are names that a caller gives to a file which has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data import DATASETS
from data.config import COCO_CLASSES, PRIORS, VOC_CLASSES
from engine.optim import OPTIMIZERS
from engine.options import DEFAULTS, LATER, TRAINING_RECIPES
from engine.schedule import SCHEDULES
from models import BACKBONES, SIZES, identify
from utils.device import AMP_TYPES
from utils.errors import UserError


def describe(saved: Mapping, path: Path, classes: Sequence[str] | None = None) -> dict:
    """Its configuration, else what its tensors tell: version, size, and of a published file the
    data set and VOC's classes.

    Raises:
        UserError: neither says enough, or the configuration is none that this program writes.
    """
    if "config" in saved:
        return check_config(saved, path)
    version, size, num_classes = _identify(saved, path)
    stored = {"version": version, "size": size}
    if num_classes == 81:  # a published file: 81 classes are COCO's, 21 VOC's
        stored["dataset"] = "COCO"
    elif num_classes == 21:
        stored |= {"dataset": "VOC", "classes": list(VOC_CLASSES)}
    elif classes is None:
        raise UserError(
            f"{path} has {num_classes - 1} classes and no names for them; give --classes"
        )
    elif len(classes) != num_classes - 1:
        raise UserError(f"{path} has {num_classes - 1} classes, but --classes names {len(classes)}")
    return stored


def check_config(saved: Mapping, path: Path) -> dict:
    """The configuration of one of our checkpoints, with its classes.

    Raises:
        UserError: a field is missing, or not of the kind that this program writes.
    """
    config, classes = saved.get("config"), saved.get("classes")
    expected = {**DEFAULTS, **TRAINING_RECIPES["published"], "root": "", "priors": ""}
    expected |= {"max_epoch": 1, "weight_decay": 0.0, "crowds": True}
    expected |= {"train_sets": [], "test_sets": []}
    if not isinstance(config, dict):
        raise UserError(f"{path}: its configuration is no dict; is it a file of this program?")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        raise UserError(f"{path}: its classes are {classes!r}, expected a list of names")
    choices = {"version": BACKBONES, "size": SIZES, "dataset": DATASETS, "amp": AMP_TYPES}
    choices["priors"] = {name for name, _ in PRIORS}
    choices |= {"recipe": TRAINING_RECIPES, "schedule": SCHEDULES, "optimizer": OPTIMIZERS}
    for key, example in expected.items():
        if key in LATER and key not in config:
            continue
        value = config.get(key)
        right = isinstance(value, type(example)) or (
            isinstance(example, float) and isinstance(value, int)
        )
        if not right or (key in choices and value not in choices[key]):
            raise UserError(f"{path}: its configuration has {key} {value!r}, which is not valid")
    if config["size"] not in BACKBONES[config["version"]].sizes:
        raise UserError(f"{path}: {config['version']} does not exist at size {config['size']}")
    return {**config, "classes": classes}


def trained_for(
    saved: Mapping, path: Path, classes: Sequence[str] | None = None
) -> tuple[list[str] | None, str | None]:
    """The classes that its weights know, and whose prior boxes; None: it cannot be told.

    A published file has no names: ``classes`` names its classes if they are as many, else 80 are
    COCO's and 20 VOC's.

    Raises:
        UserError: its tensors are no detector's.
    """
    if "config" in saved:
        config = check_config(saved, path)
        return config["classes"], config.get("priors", config["dataset"])
    _, _, num_classes = _identify(saved, path)
    known = {81: (list(COCO_CLASSES), "COCO"), 21: (list(VOC_CLASSES), "VOC")}
    names, boxes = known.get(num_classes, (None, None))
    if classes is not None and len(classes) == num_classes - 1:
        names = list(classes)
    return names, boxes


def detector(saved: Mapping, path: Path, classes: Sequence[str] | None = None) -> dict:
    """What ``describe`` tells, always with "classes", "dataset" and "priors": of a detector that is
    used as it is, VOC's where the file does not tell.

    Raises:
        UserError: as ``describe``, or ``classes`` are others than those of the file.
    """
    stored = describe(saved, path, classes)
    names, boxes = trained_for(saved, path, classes)
    if classes is not None and list(classes) != names:
        raise UserError(
            f"{path} has the {len(names)} classes {', '.join(names)}, not {', '.join(classes)}; "
            "leave the names out"
        )
    dataset = stored.get("dataset", "VOC")
    return {**stored, "classes": names, "dataset": dataset, "priors": boxes or dataset}


def _identify(saved: Mapping, path: Path) -> tuple[str, int, int]:
    try:
        return identify(saved["model"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
