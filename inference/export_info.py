"""The description inside an exported file: which detector it is, what its graph takes and gives."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data import DATASETS
from layers.detect import DetectConfig
from models.info import DetectorInfo
from utils.errors import UserError, first_line

INFO_KEY = "ssd_hardnet"
"""Key of the description in ONNX's metadata and in OpenVINO's runtime information."""
FORMAT = 1

_DETECTOR = ("version", "size", "classes", "dataset", "priors")
_KINDS = {"format": int, "version": str, "size": int, "classes": list, "dataset": str,
          "priors": str, "variance": list, "mean": list, "preprocess": bool, "nms": bool,
          "dynamic": bool, "precision": str, "detection": dict, "checkpoint": dict,
          "versions": dict}


@dataclass(frozen=True)
class ExportInfo:
    """What an exported file says about itself.

    Raises ValueError: a value that no exported file has.
    """

    detector: DetectorInfo
    variance: tuple[float, ...]  # of the box encoding: two numbers
    mean: tuple[float, ...]  # subtracted from the pixels: three numbers, BGR
    preprocess: bool  # whether the graph takes uint8 images and subtracts the mean itself
    nms: bool  # whether the graph gives detections, not the outputs of the network
    dynamic: bool
    """Whether the graph takes batches of any size, and with ``preprocess`` images of any size."""
    precision: str  # fp32, bf16, fp16 or int8
    detection: DetectConfig  # built into the graph if ``nms``, else the default of whoever runs it
    checkpoint: dict[str, str]  # "file" and "sha256" of the exported checkpoint
    versions: dict[str, str]  # versions of the packages that wrote the file
    calibration: dict[str, object] | None = None
    """Of INT8: "pictures", how many images, and "of", where they lie."""

    def __post_init__(self) -> None:
        classes, dataset = self.detector.classes, self.detector.dataset
        if not (classes and all(isinstance(name, str) for name in classes)):
            raise ValueError(f"classes {list(classes)}")
        if dataset not in DATASETS:
            raise ValueError(f"dataset {dataset!r}, which is none of {', '.join(DATASETS)}")
        self.detector.prior_config()
        for name, values, count in (("variance", self.variance, 2), ("mean", self.mean, 3)):
            fit = all(isinstance(x, int | float) and 0 < x < 256 for x in values)
            if len(values) != count or not fit:
                raise ValueError(f"{name} {list(values)}")

    @property
    def inputs(self) -> dict[str, str]:
        """Name of each input of the graph -> its type and shape in words."""
        side, batch = self.detector.size, "B" if self.dynamic else "1"
        shape = "H, W" if self.preprocess and self.dynamic else f"{side}, {side}"
        inputs = {"images": f"float32 [{batch}, 3, {shape}], BGR minus the mean"}
        if self.preprocess:
            inputs = {"pictures": f"uint8 [{batch}, {shape}, 3], BGR"}
        if self.nms:
            inputs["sizes"] = f"float32 [{batch}, 2], width and height"
        return inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs of the graph."""
        return ("boxes", "scores", "labels", "image") if self.nms else ("loc", "conf")

    def plain(self) -> dict[str, object]:
        """Return the description as plain values for JSON, as ``parse`` takes it."""
        stored = asdict(self)
        detector = stored.pop("detector")
        return {"format": FORMAT, **{key: detector[key] for key in _DETECTOR}, **stored}

    @classmethod
    def parse(cls, text: str | None, path: Path) -> ExportInfo:
        """Read the description of the file ``path``, which is JSON.

        Raises UserError: no description, a damaged one, or one of a newer version of this program.
        """
        if not text:
            raise UserError(
                f"{path} has no description of its detector; export it with python -m tools.export"
            )
        try:
            stored = json.loads(text)
            if stored["format"] > FORMAT:
                raise ValueError(f"format {stored['format']} of a newer version of this program")
            for key, kind in _KINDS.items():
                if not isinstance(stored[key], kind):
                    raise ValueError(f"{key} {stored[key]!r}")
            values = {key: tuple(x) if isinstance(x, list) else x for key, x in stored.items()}
            values["detector"] = DetectorInfo(**{key: values[key] for key in _DETECTOR})
            values["detection"] = DetectConfig(**stored["detection"])
            return cls(**{spec.name: values.get(spec.name) for spec in fields(cls)})
        except Exception as error:  # of any kind, as the text is anybody's
            damage = f"no {error}" if isinstance(error, KeyError) else first_line(error)[:200]
            raise UserError(f"{path}: {damage} in its description; export it again") from error
