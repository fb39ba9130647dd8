"""A detector ready for pictures: one object for checkpoints and exported files.

    predictor = Predictor("weights/SSD_HarDNet68_512/RUN/best.pth")
    found = predictor("street.jpg")    # {"boxes", "scores", "labels", "names"}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DATASETS
from data.config import INPUT_MEAN
from data.image import read_image
from data.transforms import TestTransform
from inference.deploy import deploy
from inference.runtime import SUFFIXES, ExportedModel, open_model
from layers import Detect, PriorBox
from models import prior_config
from models.info import load_detector
from utils.device import AMP_TYPES, choose_device, to_input
from utils.errors import UserError

Picture = str | PathLike | np.ndarray
"""A file, or BGR uint8 [H, W, 3] as OpenCV reads it."""


@dataclass(frozen=True)
class Info:
    """What a detector is."""

    file: str
    version: str
    size: int
    """Side of the network's input."""
    classes: tuple[str, ...]
    """Without background: label k is ``classes[k - 1]``."""
    dataset: str
    """VOC or COCO: whose thresholds are the default."""
    priors: str
    """VOC or COCO: whose prior boxes the weights were trained with."""


class Predictor:
    """Pictures -> detections, in three stages that can be called, and timed, one by one.

    Args of the constructor:
        file: a checkpoint (.pth, .safetensors) of this program or a published one, or a network
            that ``python -m tools.export`` has written (.onnx, .xml).
        device: "auto", "cpu", "cuda" or "cuda:N"; exported files run on the CPU.
        amp: "off", "bf16" or "fp16" (on GPUs), of a checkpoint; an exported file knows its own.
        classes: names, for a file that has none.
        score_threshold, max_detections: as ``--score_threshold`` and ``--max_detections`` of
            train_test.py; None: the published ones of the data set.
        nms, class_agnostic, background_shortcut: as in ``layers.Detect``.
        threads: of an exported file's runtime, None: its default. PyTorch has
            ``torch.set_num_threads``.

    Raises:
        UserError: a file that is no detector, options that contradict it, a device that is not
            there.
    """

    def __init__(
        self,
        file: str | PathLike,
        *,
        device: str = "auto",
        amp: str = "off",
        classes: Sequence[str] | None = None,
        score_threshold: float | None = None,
        max_detections: int | None = None,
        nms: str = "hard",
        class_agnostic: bool = False,
        background_shortcut: bool = False,
        threads: int | None = None,
    ) -> None:
        path = Path(file)
        if amp not in AMP_TYPES:
            raise UserError(f"amp is {amp!r}, should be one of {', '.join(AMP_TYPES)}")
        asked = {"nms": nms, "class_agnostic": class_agnostic}
        asked["background_shortcut"] = background_shortcut
        if score_threshold is not None:
            asked["conf_thresh"] = score_threshold
        if max_detections is not None:
            asked["top_k"] = max_detections
        if path.suffix in SUFFIXES:
            if device not in ("auto", "cpu") or amp != "off" or classes is not None:
                raise UserError(
                    f"{path} is exported: it runs on the CPU, in its own precision, and has its "
                    "classes inside; leave device, amp and classes out"
                )
            self.device = torch.device("cpu")
            self.exported: ExportedModel | None = open_model(path, threads)
            about = self.exported.info
            chosen = dict(about["detection"])
            if about["nms"]:
                _refuse_other(path, asked, chosen)
        else:
            if threads is not None:
                raise UserError(f"threads is for exported files; {path} is run by PyTorch")
            self.device = choose_device(device, amp)
            self.exported = None
            net, known = load_detector(path, classes)
            about = asdict(known)
            chosen = dict(DATASETS[known.dataset].detection)
            self.net = deploy(net).to(self.device, AMP_TYPES[amp])
        self.info = Info(
            path.name, about["version"], about["size"], tuple(about["classes"]), about["dataset"],
            about["priors"],
        )  # fmt: skip
        chosen |= asked
        try:
            priors = prior_config(self.info.version, self.info.priors, self.info.size)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        self.priors = PriorBox(priors).to(self.device)()
        self.detect = Detect(**chosen, variance=priors.variance)
        self._resize = TestTransform(self.info.size)

    def __call__(self, pictures: Picture | Iterable[Picture]) -> dict | list[dict]:
        """Detections of a picture, or of each of several, which are one batch.

        Returns:
            {"boxes": float32 [n, 4], (x1, y1, x2, y2) in pixels of the picture, "scores": float32
            [n], "labels": int64 [n] in 1..C, "names": n names}, best first, tensors on the CPU; a
            list of them for several pictures. n may be 0.

        Raises:
            UserError: a file that cannot be read as a picture; an array that is none.
            FloatingPointError: as ``postprocess``.
        """
        if isinstance(pictures, Picture):
            return self([pictures])[0]
        images = [_as_array(picture) for picture in pictures]
        found = []
        for group in self.batches(images):
            sizes = [(image.shape[1], image.shape[0]) for image in group]
            found += self.postprocess(self.forward(self.preprocess(group)), sizes)
        return [
            {**each, "names": [self.info.classes[k - 1] for k in each["labels"].tolist()]}
            for each in found
        ]

    def batches(self, images: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """All at once, or one by one where a graph can take no more."""
        fixed = self.exported is not None and (
            not self.exported.info["dynamic"]
            or (self.exported.info["preprocess"] and len({x.shape for x in images}) > 1)
        )
        step = 1 if fixed else max(len(images), 1)
        for start in range(0, len(images), step):
            yield images[start : start + step]

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor | dict[str, np.ndarray]:
        """BGR uint8 [H, W, 3] pictures -> what ``forward`` takes: float32 [B, 3, S, S] minus the
        mean on the device, or the inputs of an exported graph by name."""
        if self.exported is None:
            return to_input(self.stack(images), INPUT_MEAN, self.device)
        about, inputs = self.exported.info, {}
        if about["preprocess"]:
            whole = images if about["dynamic"] else [self._resize(image) for image in images]
            inputs["pictures"] = np.stack(whole)
        else:
            batch = to_input(self.stack(images), INPUT_MEAN, self.device)
            inputs["images"] = batch.contiguous().numpy()
        if about["nms"]:
            sizes = [(image.shape[1], image.shape[0]) for image in images]
            inputs["sizes"] = np.array(sizes, np.float32)
        return inputs

    def stack(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [B, 3, S, S], channels last."""
        stacked = np.stack([self._resize(image) for image in images])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def forward(self, batch: Tensor | dict[str, np.ndarray]) -> dict[str, Tensor]:
        """The network: {"loc" [B, P, 4], "conf" [B, P, C]}, or what a graph with suppression gives:
        {"boxes" [N, 4], "scores" [N], "labels" [N], "image" [N]}."""
        if self.exported is not None:
            outputs = self.exported(batch)
            return {name: torch.from_numpy(value) for name, value in outputs.items()}
        loc, conf = self.net(batch)
        return {"loc": loc, "conf": conf}

    @torch.inference_mode()
    def postprocess(
        self, outputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of a batch of pictures of ``sizes`` (width, height), without names.

        Raises:
            FloatingPointError: as ``layers.Detect``. Of a graph with its own suppression boxes are
                looked at, while a score that is NaN is below every threshold in there.
        """
        if "loc" in outputs:
            found = self.detect(outputs["loc"], outputs["conf"], self.priors, sizes)
            return [{key: value.cpu() for key, value in each.items()} for each in found]
        if not all(outputs[key].isfinite().all() for key in ("boxes", "scores")):
            raise FloatingPointError("a detection contains NaN or infinity")
        over = outputs["scores"] > self.detect.config.conf_thresh
        most = self.detect.config.top_k
        of = [(over & (outputs["image"] == i)).nonzero().flatten() for i in range(len(sizes))]
        return [
            {key: outputs[key][mine[:most]] for key in ("boxes", "scores", "labels")} for mine in of
        ]


def _as_array(picture: Picture) -> np.ndarray:
    if not isinstance(picture, np.ndarray):
        return read_image(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UserError(
            f"a picture is {picture.dtype} {list(picture.shape)}, should be uint8 "
            "[height, width, 3], BGR as OpenCV reads it"
        )
    return picture


_OPTIONS = {"conf_thresh": "score_threshold", "top_k": "max_detections"}


def _refuse_other(path: Path, asked: dict, inside: dict) -> None:
    """UserError unless what is ``asked`` can be had of what a graph does by itself: the same, a
    higher threshold or fewer detections, which are a part of what it finds."""
    alike = {**inside, "nms": "hard", "class_agnostic": False, "background_shortcut": False}
    for key, value in asked.items():
        fewer = (key == "conf_thresh" and value > alike[key]) or (
            key == "top_k" and value < alike[key]
        )
        if value != alike[key] and not fewer:
            raise UserError(
                f"{path} has its suppression inside, with {_OPTIONS.get(key, key)} {alike[key]}, "
                f"so it cannot be {value}; export it again, without --with-nms"
            )
