"""Compare what an exported file detects with what its PyTorch network detects."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data import DetectionData
from inference.export_info import ExportInfo
from inference.images import Images
from inference.predictor import Predictor, arrays
from inference.runtime import Arrays
from layers import Detect, PriorBox
from layers.boxes import iou
from utils.device import to_input
from utils.errors import UserError


@dataclass(frozen=True)
class Tolerance:
    """How much an exported file may differ from the network."""

    matched: float  # least share of boxes with a partner
    score: float | None = None
    pixels: float | None = None  # largest differences of partners, as is score; None: any
    ap: float = 0.3
    """Largest loss in points (100 x AP); on 72 images of BCCD rounding moves a tenth."""


TOLERANCE = {"fp32": Tolerance(0.999, score=1e-3, pixels=0.5, ap=0.1),
             "bf16": Tolerance(0.97),
             "fp16": Tolerance(0.99),
             "int8": Tolerance(0.9, ap=0.5)}  # by precision
MARGIN = 0.05
"""Boxes are compared from this far above the score threshold: at the threshold itself rounding
decides whether a box exists."""
PARTNER_IOU = 0.5
BATCH = 4  # images a batch, of a graph that takes any number


@dataclass(frozen=True)
class Comparison:
    """Two lists of detections, box by box."""

    boxes: int  # boxes of either list that reach the score floor
    unmatched_network: int  # boxes without a partner
    unmatched_file: int
    matched: float | None  # share of those with a partner; None without boxes
    score_difference: float | None
    pixel_difference: float | None
    least_iou: float | None  # the three are of partners; None without partners


class APs(NamedTuple):
    """The AP of the network and of the file, 0..1."""

    metric: str
    network: float
    file: float

    def lost(self) -> float:
        """Return the points of AP that the file loses."""
        return 100 * (self.network - self.file)


@dataclass(frozen=True)
class Proof:
    """A comparison, and what was compared."""

    images: int
    of: str  # the folder of the images
    score_floor: float
    comparison: Comparison
    ap: APs | None  # None without ground truth

    def plain(self) -> dict[str, object]:
        """Return the proof as plain values for JSON."""
        about = {"pictures": self.images, "of": self.of, "score_floor": self.score_floor}
        return {**about, **asdict(self.comparison), "ap": self.ap and self.ap._asdict()}

    def lines(self) -> list[str]:
        """Return the proof in lines of text."""
        found, ap = self.comparison, self.ap
        lines = [f"compared with PyTorch on {self.images} images ({self.of}):",
                 f"  {found.boxes} boxes of score {self.score_floor:g} or more, "
                 f"{found.unmatched_network} of the network's and {found.unmatched_file} of the "
                 f"file's without a partner ({100 * found.matched:.2f} % matched)"]
        if found.least_iou is not None:
            lines.append(f"  largest score difference {found.score_difference:.2g}, largest "
                         f"coordinate difference {found.pixel_difference:.2g} pixels; least IoU "
                         f"{found.least_iou:.5f}")
        if ap is None:
            return [*lines, "  no ground truth: the AP is not compared"]
        return [*lines,
                f"  {ap.metric}: {ap.network:.4f} in PyTorch, {ap.file:.4f} in the file "
                f"({-ap.lost():+.2f} points)"]


class TooDifferent(Exception):
    """The exported file does not detect what the network detects: one sentence."""

    def __init__(self, sentence: str, proof: Proof | None = None) -> None:
        super().__init__(sentence)
        self.proof = proof


@torch.inference_mode()
def prove(net: nn.Module, info: ExportInfo, path: Path, images: Images) -> Proof:
    """Run real images through the network as it was trained and through the file ``path``.

    Raises UserError if the network finds no box to compare, or gives NaN or infinity; TooDifferent
    if the file does.
    """
    predictor, detect = Predictor(path), Detect.of(info.detection, info.variance)
    priors = PriorBox(info.detector.prior_config())()
    expected, found = [], []
    for batch in images.batches(BATCH if info.dynamic else 1):
        loc, conf = net(to_input(predictor.stack(batch), info.mean, priors.device))
        sizes = [(image.shape[1], image.shape[0]) for image in batch]
        try:
            expected += arrays(detect(loc, conf, priors, sizes))
        except FloatingPointError as error:
            raise UserError(f"the network of {info.checkpoint['file']} fails ({error}): its "
                            "training diverged or its weights are damaged; export another "
                            "checkpoint") from error
        try:
            found += arrays(predictor(batch))
        except FloatingPointError as error:
            raise TooDifferent(f"{path.name} is not kept: {error}") from error
    floor = info.detection.conf_thresh + MARGIN
    comparison = compare(expected, found, floor)
    if not comparison.boxes:
        raise UserError(f"the network finds nothing of score {floor:g} or more (--score_threshold "
                        f"{info.detection.conf_thresh:g} and a margin of {MARGIN:g}) on the "
                        f"{len(images)} images of {images.about}, so nothing can be proven; give "
                        "a lower --score_threshold, other --images, or a trained network")
    aps = _average_precisions(images.dataset, expected, found) if images.scored else None
    return Proof(len(images), images.about, floor, comparison, aps)


def _average_precisions(dataset: DetectionData, *found: Sequence[Arrays]) -> APs | None:
    with tempfile.TemporaryDirectory() as folder:
        network, file = (dataset.evaluate(each, Path(folder)) for each in found)
    if network["value"] is None:
        return None
    return APs(network["metric"], network["value"], file["value"])


def compare(expected: Sequence[Arrays], found: Sequence[Arrays], floor: float) -> Comparison:
    """Match two lists of detections, one entry an image, box by box.

    Partners are boxes of one image and one class with an IoU of at least `PARTNER_IOU`. Each box
    has at most one partner; the highest IoU is matched first. Boxes of either list with a score of
    at least ``floor`` are counted; their partners may score lower.
    """
    counted, unmatched = 0, [0, 0]
    score, pixels, ious = [], [], []
    for pair in zip(expected, found, strict=True):
        one, other = pair
        *partners, overlap = _partners(one, other)
        over = [each["scores"] >= floor for each in pair]
        counted += sum(int(each.sum()) for each in over)
        for side in range(2):
            unmatched[side] += int(np.delete(over[side], partners[side]).sum())
        meant = over[0][partners[0]] | over[1][partners[1]]
        a, b = (indices[meant] for indices in partners)
        score += np.abs(one["scores"][a] - other["scores"][b]).tolist()
        pixels += np.abs(one["boxes"][a] - other["boxes"][b]).max(1, initial=0).tolist()
        ious += overlap[meant].tolist()
    matched = 1 - sum(unmatched) / counted if counted else None
    largest = (max(differences, default=None) for differences in (score, pixels))
    return Comparison(counted, *unmatched, matched, *largest, min(ious, default=None))


def _partners(one: Arrays, other: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return indices into the two, and IoU, of the boxes that are partners."""
    table = iou(*(torch.from_numpy(each["boxes"]).double() for each in (one, other))).numpy()
    table[one["labels"][:, None] != other["labels"][None]] = 0
    pairs = []
    free = np.ones(len(one["scores"]), bool), np.ones(len(other["scores"]), bool)
    rows, columns = np.nonzero(table >= PARTNER_IOU)
    for k in np.argsort(-table[rows, columns], kind="stable"):
        i, j = rows[k], columns[k]
        if free[0][i] and free[1][j]:
            free[0][i] = free[1][j] = False
            pairs.append((i, j))
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    return a, b, table[a, b]


def excess(comparison: Comparison, tolerance: Tolerance, ap: APs | None = None) -> str:
    """Return what exceeds the tolerance, in words; empty if nothing does."""
    if comparison.matched < tolerance.matched:
        return (f"{100 * comparison.matched:.2f} % of the boxes have a partner, "
                f"{100 * tolerance.matched:g} % are needed (a barely trained detector has many "
                "boxes of nearly equal scores, which rounding swaps: train it longer, or export it "
                "with a higher --score_threshold)")
    for difference, limit, what in (
        (comparison.score_difference, tolerance.score, "a score"),
        (comparison.pixel_difference, tolerance.pixels, "a coordinate, in pixels,"),
    ):
        if limit is not None and (difference or 0) > limit:
            return f"{what} differs by {difference:.4g}, {limit:g} is allowed"
    if ap is not None and ap.lost() > tolerance.ap:
        return f"it loses {ap.lost():.2f} points of AP, {tolerance.ap:g} are allowed"
    return ""
