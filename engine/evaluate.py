"""Detect over a data set, keep the detections, score them."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from data import DetectionData, bootstrap
from data.curves import CURVES_FILE
from data.detections import save_detections
from data.image_sets import sets_name
from data.loading import Loader, TestSet
from data.voc_comp4 import COMP4_FILES
from engine.distributed import World
from engine.options import Call, Options
from engine.resolve import dataset_options
from engine.run import Run
from engine.steps import detect_all
from inference.draw import draw_examples
from inference.predictor import Predictor, arrays
from layers import Detect
from layers.detect import DetectConfig
from utils import nms
from utils.errors import UserError
from utils.files import write_json
from utils.logger import LOGGER, Progress

SCORES = ("results.json", CURVES_FILE)
"""What scoring leaves in a folder beside the official files."""


def detect_set(
    net: nn.Module, detect: Detect, priors: Tensor, dataset: DetectionData, options: Options,
    world: World, on_batch: Callable[[int], None] = lambda images: None,
) -> list[dict[str, np.ndarray]] | None:
    """Return the detections of all images of ``dataset``, in order; None on ranks but 0.

    Each process detects in its share of the images.

    Raises:
        UserError: the output of the network is not finite, or an image cannot be read.
    """
    share = list(world.share_of(len(dataset)))
    samples = Subset(TestSet(dataset, options.size), share)
    batch = -(-options.batch_size // world.size)
    loader = Loader(samples, options.num_workers, priors.device.type == "cuda", batch_size=batch)
    progress = Progress("test", len(loader), options.log_iters)

    def advance(images: int) -> None:
        progress.update(images)
        on_batch(images)

    try:
        found = detect_all(net, detect, priors, loader, options.amp, advance)
    except FloatingPointError as error:
        raise UserError(_not_finite(error, options.amp)) from error
    finally:
        progress.close()
    return world.collect(found, len(dataset))


def _not_finite(error: FloatingPointError, amp: str) -> str:
    causes = "its weights have diverged, or their file is damaged"
    if amp == "fp16":
        causes = f"--amp fp16 ends at 65504, --amp bf16 and off do not; or {causes}"
    return f"the network's output is not finite ({error}); {causes}"


def detect_by(predictor: Predictor, dataset: DetectionData,
              options: Options) -> list[dict[str, np.ndarray]]:
    """Return the detections of all images of ``dataset`` by a predictor, in order.

    Raises:
        UserError: its output is not finite, or an image cannot be read.
    """
    found, size = [], options.batch_size
    progress = Progress("test", -(-len(dataset) // size), options.log_iters)
    try:
        for start in range(0, len(dataset), size):
            batch = range(start, min(start + size, len(dataset)))
            found += predictor([dataset.pull_image(i) for i in batch])
            progress.update(len(batch))
    except FloatingPointError as error:
        raise UserError(f"the output of {predictor.file} is not finite ({error})") from error
    finally:
        progress.close()
    return arrays(found)


def origin_of(options: Options, detection: DetectConfig, checkpoint: dict, device: torch.device,
              class_map: str | None = None) -> dict:
    """Return everything that decides the detections of a call. It is kept with them."""
    config = asdict(detection)
    return {
        "checkpoint": checkpoint, "dataset": options.dataset, "priors": options.priors,
        "class_map": class_map, "root": options.root,
        "sets": "+".join(map(str, options.test_sets)),
        **dataset_options(options, Call(), testing=True),
        "overfit": options.overfit,
        "classes": list(options.classes),
        "thresholds": {
            "score": config.pop("conf_thresh"), "nms": config.pop("nms_thresh"),
            "per_class": config.pop("per_class"), "per_image": config.pop("top_k"),
        },
        "suppression": config, "amp": options.amp,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__, "nms": nms.backend(device.type)},
    }


def detection_of(origin: dict) -> DetectConfig:
    """Return the detection settings that `origin_of` wrote; any error for another dict."""
    limits = origin["thresholds"]
    return DetectConfig(limits["score"], limits["nms"], limits["per_class"], limits["per_image"],
                        **origin["suppression"])


def keep_and_score(dataset: DetectionData, detections: list[dict[str, np.ndarray]], origin: dict,
                   folder: Path, name: str) -> dict:
    """Replace the detections that ``folder`` holds by these, and score them."""
    save_detections(folder / "detections.npz", dataset.ids, detections, origin)
    for earlier in [*(folder / file for file in SCORES), *folder.glob(COMP4_FILES)]:
        earlier.unlink(missing_ok=True)
    return score(dataset, detections, origin, folder, name)


def score(dataset: DetectionData, detections: list[dict[str, np.ndarray]], origin: dict,
          folder: Path, name: str) -> dict:
    """Write the official files and results.json, log the scores, and return the results.

    Args:
        detections: one {"boxes", "scores", "labels"} an image of ``dataset``.
        origin: of ``origin_of``.
        name: of the detector, for files that an evaluation server takes.
    """
    count = sum(len(d["scores"]) for d in detections)
    results = {**dataset.evaluate(detections, folder, name), **origin, "images": len(dataset),
               "detection_count": count}
    path = folder / "results.json"
    write_json(path, results)
    for line in results["notes"]:
        LOGGER.info("  %s", line)
    intervals = results.get("per_class_interval", {})
    for label, value in results["per_class"].items():
        LOGGER.info("  %-20s %s", label, _shown(value, intervals.get(label)))
    LOGGER.info("%s: %s (%d images, %d detections of score > %g; %s)", results["metric"],
                _shown(results["value"], results.get("interval")), results["images"],
                results["detection_count"], origin["thresholds"]["score"], path)
    return results


def _shown(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or value < 0:  # pycocotools says -1
        return "no ground truth to score against"
    return f"{value:.4f}" + (f", 95 %: {bootstrap.text(interval)}" if interval else "")


@dataclass
class Evaluation:
    """The evaluations of a training run: detect on the test set, keep, score."""

    detect: Detect
    priors: Tensor
    run: Run
    world: World

    def __call__(self, net: nn.Module, name: str, on_batch: Callable[[int], None]) -> dict | None:
        """Return the results of ``score``, or None on ranks but 0.

        The files lie in ss_predict/``name`` of the run's folder.
        """
        dataset, options = self.run.test_set, self.run.options
        dataset.quick_score = True
        self.detections = detect_set(net, self.detect, self.priors, dataset, options, self.world,
                                     on_batch)
        if self.detections is None:
            return None
        run = self.run.folder.path
        checkpoint = {"file": f"{run.name}, {name}"}
        origin = origin_of(options, self.detect.config, checkpoint, self.priors.device)
        folder = run / "ss_predict" / name / sets_name(options.test_sets)
        return keep_and_score(dataset, self.detections, origin, folder, options.network)

    def draw(self) -> np.ndarray:
        """Return images of the last evaluation with ground truth and detections drawn."""
        return draw_examples(self.run.test_set, self.detections)
