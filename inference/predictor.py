"""A detector that takes images: the same object for checkpoints and exported files.

    predictor = Predictor("weights/SSD_HarDNet68_512/RUN/best.pth")
    found = predictor("street.jpg")    # {"boxes", "scores", "labels", "names"}
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor

from data.config import INPUT_MEAN
from data.image import check_pixels, limit_pixels, read_image
from data.transforms import to_square
from inference.deploy import deploy
from inference.origins import find_origins
from inference.runtime import EXPORTED_SUFFIXES, ExportedModel, graph_inputs, open_model
from inference.views import Views, merge
from layers import Detect, PriorBox
from layers.detect import DetectConfig
from models.info import load_detector
from utils.device import AMP_TYPES, choose_device, to_input
from utils.errors import UserError, first_line

Image = str | PathLike | np.ndarray | PIL.Image.Image
"""A file, an array or a PIL image.

An array is uint8: BGR [H, W, 3] as OpenCV reads it, [H, W, 4] with an alpha that is left out, or
grey, [H, W] or [H, W, 1]. A PIL image has any mode but F and I, and is turned as its EXIF
orientation says."""
VIEWS_AT_A_TIME = 8
"""Most views of an image in a batch."""
TAKEN = "a path, a BGR or grey array of uint8, [H, W, 3], [H, W, 4] or [H, W], or a PIL image"


class Predictor:
    """Detect objects in images: ``preprocess``, ``forward`` and ``postprocess`` in one call.

    Args of the constructor:
        file: a checkpoint (.pth, .safetensors) of this program or a published one, or an exported
            file (.onnx, .xml) of ``python -m tools.export``.
        device: a name of `utils.device.choose_device`. Exported files run on the CPU.
        amp: "off", "bf16" or "fp16" (GPU only). An exported file has its own precision.
        classes: class names, for a checkpoint that stores none.
        score_threshold, max_detections, max_per_class: lowest score of a detection, and most
            detections of an image and of a class in it; None: the published values.
        nms, class_agnostic, background_shortcut: as in ``layers.detect.DetectConfig``.
        threads: CPU threads of an exported file's runtime; None: the runtime chooses. For a
            checkpoint use ``torch.set_num_threads``.
        max_pixels: refuse images with more pixels, in all of this process; None changes nothing.
        tiles, overlap, flip: see ``inference.views.Views``; by default the whole image alone.
        explain: tell the prior box of each detection, in the whole image alone.

    Attributes: ``file``, its name; ``info``, a ``DetectorInfo``; ``config``, a ``DetectConfig``;
    ``device``; ``priors``, [P, 4]; ``exported``, the file in its runtime, None for a checkpoint.

    Raises:
        UserError: the file is no detector, options contradict it, or the device does not exist.
        ValueError: as ``DetectConfig``.
    """

    def __init__(self, file: str | PathLike, *, device: str = "auto", amp: str = "off",
                 classes: Sequence[str] | None = None, score_threshold: float | None = None,
                 max_detections: int | None = None, nms: str = "hard", class_agnostic: bool = False,
                 background_shortcut: bool = False, threads: int | None = None,
                 max_pixels: int | None = None, max_per_class: int | None = None, tiles: int = 0,
                 overlap: float | None = None, flip: bool = False, explain: bool = False) -> None:
        limit_pixels(max_pixels)
        self.views = Views(tiles, Views.overlap if overlap is None else overlap, flip)
        path = Path(file)
        self.file, self.explain = path.name, explain
        if explain and (tiles or flip):
            raise UserError("explain is for the whole image alone; leave tiles and flip out")
        self.exported: ExportedModel | None = None
        if amp not in AMP_TYPES:
            raise UserError(f"amp is {amp!r}, should be one of {', '.join(AMP_TYPES)}")
        if path.suffix == ".pt2":
            raise UserError(f"{path}: .pt2 files are programs and are not run; export to ONNX")
        if path.suffix in EXPORTED_SUFFIXES:
            if device not in ("auto", "cpu") or amp != "off" or classes is not None:
                raise UserError(f"{path} is exported: it runs on the CPU, in its own precision, "
                                "and has its classes inside; leave device, amp and classes out")
            self.device = torch.device("cpu")
            self.exported = open_model(path, threads)
            self.info = self.exported.info.detector
            if explain and self.exported.info.nms:
                raise UserError(f"{path} has its non-maximum suppression inside, so it cannot "
                                "explain detections; export it again without --with-nms")
            config, variance = self.exported.info.detection, self.exported.info.variance
        else:
            if threads is not None:
                raise UserError(f"threads is for exported files; {path} is run by PyTorch")
            self.device = choose_device(device, amp)
            net, self.info = load_detector(path, classes)
            self.net = deploy(net).to(self.device, AMP_TYPES[amp])
            config, variance = self.info.detection(), self.info.prior_config().variance
        self.priors = PriorBox(self.info.prior_config()).to(self.device)()
        self.detect = Detect.of(config, variance)
        self.config = replace(config.with_limits(score_threshold, max_detections, max_per_class),
                              nms=nms, class_agnostic=class_agnostic,
                              background_shortcut=background_shortcut)

    @property
    def config(self) -> DetectConfig:
        """The detection settings.

        Assign other settings to change them:
        ``predictor.config = replace(predictor.config, conf_thresh=0.4)``. An exported file with NMS
        inside allows a higher threshold and fewer detections only, else raises UserError.
        """
        return self.detect.config

    @config.setter
    def config(self, config: DetectConfig) -> None:
        if self.exported is not None and self.exported.info.nms:
            inside = self.exported.info.detection
            threshold = max(inside.conf_thresh, config.conf_thresh)
            if config != inside.with_limits(threshold, min(inside.top_k, config.top_k)):
                raise UserError(f"{self.exported.path} has its non-maximum suppression inside: "
                                f"hard, per class, scores over {inside.conf_thresh:g}, at most "
                                f"{inside.top_k} detections an image; {config} is not a part of "
                                "that; export it again without --with-nms")
        self.detect = Detect.of(config, self.detect.variance)

    def __call__(self, images: Image | Iterable[Image]) -> dict | list[dict]:
        """Detect in one image, or in several as one batch.

        Returns:
            One dict an image: "boxes" float32 [n, 4], (x1, y1, x2, y2) in pixels of the image,
            "scores" float32 [n] and "labels" int64 [n] in 1..C, tensors on the CPU, and "names", n
            class names; best score first. n may be 0. A single image gives its dict, several give
            a list. ``explain`` adds "priors" int64 [n], rows of ``priors``, and "origins", n
            ``inference.origins.Origin``.

        Raises:
            UserError: a file that cannot be read as an image, or what is no ``Image``.
            FloatingPointError: as ``postprocess``.
        """
        if isinstance(images, Image):
            return self([images])[0]
        if isinstance(images, Mapping) or not isinstance(images, Iterable):
            raise UserError(f"{type(images).__name__} is not an image; give {TAKEN}, or a list")
        arrays = [_load(image) for image in images]
        views = [self.views.of(image) for image in arrays]
        parts = [view.image for each in views for view in each]
        step, parts_found = max(len(arrays), VIEWS_AT_A_TIME), []
        for start in range(0, len(parts), step):
            for batch in self.batches(parts[start : start + step]):
                sizes = [(image.shape[1], image.shape[0]) for image in batch]
                parts_found += self.postprocess(self.forward(self.preprocess(batch)), sizes)
        rest = iter(parts_found)
        found = [merge(each, [*islice(rest, len(each))], self.detect) for each in views]
        for image, each in zip(arrays, found, strict=True):
            each["names"] = [self.info.classes[label - 1] for label in each["labels"].tolist()]
            if self.explain:
                each["origins"] = find_origins(each, image.shape[1::-1], self.priors,
                                               self.info.prior_config())
        return found

    def batches(self, images: Sequence[np.ndarray]) -> Iterator[Sequence[np.ndarray]]:
        """Split images into batches for ``preprocess``: one, or single images.

        Single images where a graph takes no more, or resizes images of different sizes itself.
        """
        step = max(len(images), 1)
        if self.exported is not None:
            info = self.exported.info
            if not info.dynamic or (info.preprocess and len({x.shape for x in images}) > 1):
                step = 1
        for start in range(0, len(images), step):
            yield images[start : start + step]

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor | dict[str, np.ndarray]:
        """Return the input of ``forward`` for BGR uint8 [H, W, 3] images.

        float32 [B, 3, S, S] minus the mean on the device, or the inputs of an exported graph by
        name.
        """
        if self.exported is not None:
            return graph_inputs(images, self.exported.info)
        return to_input(self.stack(images), INPUT_MEAN, self.device)

    def stack(self, images: Sequence[np.ndarray]) -> Tensor:
        """Return the images resized: uint8 [B, 3, S, S], channels last."""
        stacked = np.stack([to_square(image, self.info.size) for image in images])
        return torch.from_numpy(stacked).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def forward(self, batch: Tensor | dict[str, np.ndarray]) -> dict[str, Tensor]:
        """Run the network.

        Returns:
            {"loc" [B, P, 4], "conf" [B, P, C]}. A graph with NMS gives {"boxes" [n, 4], "scores"
            [n], "labels" [n], "image" [n]} of the whole batch, see ``ExportedModel``.
        """
        if self.exported is not None:
            return {name: torch.from_numpy(value) for name, value in self.exported(batch).items()}
        loc, conf = self.net(batch)
        return {"loc": loc, "conf": conf}

    @torch.inference_mode()
    def postprocess(self, outputs: dict[str, Tensor],
                    sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return the detections of a batch, without names and origins.

        Args:
            outputs: of ``forward``.
            sizes: (width, height) of the images in pixels.

        Raises:
            FloatingPointError: as ``layers.Detect``; of a graph with NMS, a detection with NaN or
                infinity. A NaN score inside such a graph is below every threshold, so it is not
                noticed.
        """
        if "loc" in outputs:
            found = self.detect(outputs["loc"], outputs["conf"], self.priors, sizes, self.explain)
            return [{key: value.cpu() for key, value in each.items()} for each in found]
        if not all(outputs[key].isfinite().all() for key in ("boxes", "scores")):
            raise FloatingPointError("a detection contains NaN or infinity")
        over = outputs["scores"] > self.config.conf_thresh
        return [
            {key: outputs[key][mine][: self.config.top_k] for key in ("boxes", "scores", "labels")}
            for mine in (over & (outputs["image"] == i) for i in range(len(sizes)))]


def arrays(found: Sequence[dict]) -> list[dict[str, np.ndarray]]:
    """Return the "boxes", "scores" and "labels" of detections on the CPU as arrays."""
    return [{key: each[key].numpy() for key in ("boxes", "scores", "labels")} for each in found]


def _load(image: object) -> np.ndarray:
    """Return BGR uint8 [H, W, 3] of a file, an array or a PIL image."""
    if isinstance(image, str | PathLike):
        return read_image(os.fsdecode(image))
    if isinstance(image, PIL.Image.Image):
        return _of_pil(image)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{type(image).__name__} is not an image; give {TAKEN}")
    grey = image[:, :, None] if image.ndim == 2 else image
    channels = grey.shape[2] if grey.ndim == 3 and image.size else 0
    if image.dtype != np.uint8 or channels not in (1, 3, 4):
        raise UserError(f"an image is {image.dtype} {list(image.shape)}; give {TAKEN}")
    return np.repeat(grey, 3, 2) if channels == 1 else np.ascontiguousarray(grey[:, :, :3])


def _of_pil(image: PIL.Image.Image) -> np.ndarray:
    check_pixels("the PIL image", image.size)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # 16 bit, of which OpenCV keeps the upper 8
            return _load((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode not in ("F", "I"):
            return _load(np.asarray(image.convert("RGB"))[:, :, ::-1])
        fault = "no range of values; convert it to L"
    except Exception as error:  # Pillow decodes only now, and converts not from every mode
        fault = first_line(error)
    name = getattr(image, "filename", "") or "PIL image"
    raise UserError(f"{name}: no RGB image of mode {image.mode} ({fault}); give {TAKEN}")
