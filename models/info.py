"""What a checkpoint says about its detector, and the detector itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import DATASETS
from data.classes import check_classes
from data.config import COCO_CLASSES, VOC_CLASSES, PriorConfig
from layers.detect import DetectConfig
from models import build_net, prior_config
from models.identify import identify
from models.ssd import Detector
from utils.checkpoint import load_checkpoint, load_weights
from utils.errors import UserError
from utils.logger import LOGGER

PUBLISHED_CLASSES = {21: ("VOC", VOC_CLASSES), 81: ("COCO", COCO_CLASSES)}
"""Classes with background of the published detectors -> their data set, and the classes' names."""


@dataclass(frozen=True)
class DetectorInfo:
    """What a detector is, apart from its weights."""

    version: str
    """A key of ``models.BACKBONES``."""
    size: int
    """Side of the network's input in pixels."""
    classes: tuple[str, ...]
    """Without background: label k is ``classes[k - 1]``."""
    dataset: str
    """The data set, or layout, that it was trained on: whose detection thresholds are used."""
    priors: str
    """The data set whose prior boxes it was trained with."""
    assumed: bool = False
    """Whether the file stores no class names, and those of VOC or COCO were assumed."""

    @classmethod
    def of(cls, saved: Mapping, path: str | Path, classes: Sequence[str] | None = None,
           dataset: str = "VOC") -> DetectorInfo:
        """Describe a checkpoint.

        A file with a configuration is described by it. Any other file must hold exactly the tensors
        of a known detector: 20 and 80 classes are taken for VOC's and COCO's, as in the published
        files, unless ``classes`` names them.

        Args:
            saved: the checkpoint, as ``utils.checkpoint.load_checkpoint`` returns it.
            path: its file, for messages.
            classes: names for a file that stores none, without background, if they are as many;
                else they are ignored.
            dataset: the layout that is assumed of a file that tells none, and is not taken for a
                published one.

        Raises:
            UserError: the file is no detector, its configuration is not valid, or its classes have
                no names.
        """
        known = "config" in saved
        info = _from_config(saved, path) if known else _from_tensors(saved, path, classes, dataset)
        try:
            info.prior_config()
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        if info.dataset not in DATASETS:
            raise UserError(f"{path} was trained on the data set {info.dataset!r}, which is none "
                            f"of {', '.join(DATASETS)}; add it to this program, or train again")
        return info

    def check_names(self, classes: Sequence[str] | None, path: str | Path) -> None:
        """Raise UserError if ``classes`` are not the names of this detector, read from ``path``."""
        if classes is not None and tuple(classes) != self.classes:
            known = ", ".join(self.classes[:80])
            raise UserError(f"{path} has the {len(self.classes)} classes {known}, not "
                            f"{', '.join(classes)}; leave the names out")

    def build(self) -> Detector:
        """Return the network with new weights."""
        return build_net(self.version, self.size, len(self.classes) + 1)

    def prior_config(self) -> PriorConfig:
        """Return the preset of its prior boxes."""
        return prior_config(self.version, self.priors, self.size)

    def detection(self) -> DetectConfig:
        """Return the published detection settings of its data set."""
        return published_detection(self.dataset)


def published_detection(dataset: str) -> DetectConfig:
    """Return the published detection settings of a data set, a key of ``data.DATASETS``."""
    return DetectConfig(**DATASETS[dataset].detection)


def load_detector(path: str | Path,
                  classes: Sequence[str] | None = None) -> tuple[Detector, DetectorInfo]:
    """Load the detector of a checkpoint, of this program or a published one.

    Args:
        classes: names for a file that stores none, without background.

    Returns:
        The network on the CPU in evaluation mode, and what it is.

    Raises:
        UserError: as ``load_checkpoint``, ``DetectorInfo.of`` and ``load_weights``, or the file has
            other names than ``classes``.
    """
    saved = load_checkpoint(path)
    info = DetectorInfo.of(saved, path, classes)
    info.check_names(classes, path)
    if info.assumed:
        LOGGER.info("%s stores no class names: its %d classes are taken for those of %s", path,
                    len(info.classes), info.dataset)
    net = info.build()
    load_weights(net, saved["model"], path)
    return net.eval(), info


def _from_config(saved: Mapping, path: str | Path) -> DetectorInfo:
    config, classes = saved["config"], saved.get("classes")
    if not (isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)):
        raise UserError(f"{path}: its classes are {classes!r:.60}, expected a list of names")
    classes = check_classes(classes, f"{path}: its classes")
    heads = saved["model"].get("conf.0.weight")
    # Before a network is built, whose size the number of names decides.
    rows = heads.shape[0] if heads is not None and heads.dim() else 0
    if not rows or rows % (len(classes) + 1):
        raise UserError(f"{path} names {len(classes)} classes, but its conf.0.weight of {rows} "
                        "rows is not of as many and background; it is damaged")
    kinds = {"version": str, "size": int, "dataset": str, "priors": str}
    for key, kind in kinds.items():
        if type(config.get(key)) is not kind:
            raise UserError(f"{path}: its configuration has {key} {config.get(key)!r:.60}, which "
                            "is not valid; give a checkpoint of this program")
    return DetectorInfo(**{key: config[key] for key in kinds}, classes=classes)


def _from_tensors(saved: Mapping, path: str | Path, classes: Sequence[str] | None,
                  dataset: str) -> DetectorInfo:
    try:
        version, size, num_classes = identify(saved["model"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    count = num_classes - 1
    if num_classes in PUBLISHED_CLASSES:
        dataset, names = PUBLISHED_CLASSES[num_classes]
        if classes is None or len(classes) != count:
            return DetectorInfo(version, size, names, dataset, dataset, assumed=True)
    elif classes is None:
        raise UserError(f"{path} has {count} classes and no names for them; give --classes")
    elif len(classes) != count:
        raise UserError(f"{path} has {count} classes, but --classes names {len(classes)}")
    return DetectorInfo(version, size, tuple(classes), dataset, DATASETS[dataset].priors)
