"""From network outputs to detections in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from layers.boxes import decode
from utils.nms import batched_nms, rank_in_group

SUPPRESSION = {"hard": "hard", "soft": "linear", "soft-gaussian": "gaussian"}
"""Values of ``DetectConfig.nms`` -> methods of ``utils.nms.batched_nms``."""

# A prior whose background score is at least this has no detections under the shortcut.
BACKGROUND_SURE = 0.9


@dataclass(frozen=True)
class DetectConfig:
    """Which boxes are detections.

    Raises:
        ValueError: a limit below 1, a threshold outside 0..1, an unknown ``nms``.
    """

    conf_thresh: float = 0.02
    """A class's score must be above it."""
    nms_thresh: float = 0.45
    """IoU (pixel convention) above which the lower-scored box of a class is dropped."""
    per_class: int = 50
    """Most detections kept per class and image."""
    top_k: int = 200
    """Most detections kept per image."""
    nms: str = "hard"
    """ "hard", or Soft-NMS (arXiv 1704.04503): "soft" decays scores linearly above ``nms_thresh``,
    "soft-gaussian" by a Gaussian of sigma 0.5. Scores that decay below ``conf_thresh`` are dropped;
    detections have the decayed scores."""
    class_agnostic: bool = False
    """Whether boxes of different classes suppress each other, too."""
    background_shortcut: bool = False
    """Whether a prior whose background score is at least 0.9 has no detections, as in the authors'
    later release. It changes the detections when ``conf_thresh`` is below 0.1."""

    def __post_init__(self) -> None:
        if self.nms not in SUPPRESSION:
            raise ValueError(f"nms is {self.nms!r}, should be one of {', '.join(SUPPRESSION)}")
        limits = self.per_class, self.top_k
        if not all(isinstance(limit, int) for limit in limits) or min(limits) < 1:
            raise ValueError(f"per_class {limits[0]} and top_k {limits[1]} should be whole numbers "
                             "over 0")
        if not (0 <= self.conf_thresh <= 1 and 0 <= self.nms_thresh <= 1):
            raise ValueError(f"conf_thresh {self.conf_thresh} and nms_thresh {self.nms_thresh} "
                             "should be in 0..1")

    def with_limits(self, conf_thresh: float | None, top_k: int | None,
                    per_class: int | None = None) -> DetectConfig:
        """Return the settings with another score threshold and limits; None: the own ones."""
        asked = {"conf_thresh": conf_thresh, "top_k": top_k, "per_class": per_class}
        return replace(self, **{key: value for key, value in asked.items() if value is not None})


class Detect(nn.Module):
    """Softmax, score threshold, decoding, non-maximum suppression, limits per class and image.

    All images and classes of a batch are processed at once; an image's detections do not depend on
    the rest of the batch. Only priors that can exceed the score threshold are softmaxed and
    decoded.

    The constructor takes the fields of ``DetectConfig``, and the ``variance`` of the encoding.

    Raises:
        ValueError: as ``DetectConfig``.
    """

    def __init__(self, conf_thresh: float = 0.02, nms_thresh: float = 0.45, per_class: int = 50,
                 top_k: int = 200, variance: tuple[float, float] = (0.1, 0.2), nms: str = "hard",
                 class_agnostic: bool = False, background_shortcut: bool = False) -> None:
        super().__init__()
        self.config = DetectConfig(conf_thresh, nms_thresh, per_class, top_k, nms, class_agnostic,
                                   background_shortcut)
        self.variance = variance

    @classmethod
    def of(cls, config: DetectConfig, variance: tuple[float, float] = (0.1, 0.2)) -> Detect:
        """Return the layer with the settings of ``config``."""
        return cls(**asdict(config), variance=variance)

    @torch.no_grad()
    def forward(self, loc: Tensor, conf: Tensor, priors: Tensor,
                sizes: Sequence[tuple[int, int]],
                with_priors: bool = False) -> list[dict[str, Tensor]]:
        """Return the detections of a batch.

        Args:
            loc: [B, P, 4] encoded offsets.
            conf: [B, P, C] logits, class 0 = background.
            priors: [P, 4], centre-size, relative.
            sizes: (width, height) in pixels of the B images.
            with_priors: whether to tell the prior of each detection.

        Returns:
            One dict per image: "boxes" float32 [n, 4] corners in pixels of the image (not clipped
            to it), "scores" float32 [n], "labels" int64 [n] in 1..C-1. n may be 0. Sorted by score;
            ties: lower class first, then earlier prior (class-agnostic: earlier prior first, then
            lower class). ``with_priors``: also "priors" int64 [n], indices in 0..P-1.

        Raises:
            ValueError: the shapes of the arguments do not fit together.
            FloatingPointError: ``conf`` has NaN or +infinity, or ``loc`` has NaN or infinity for a
                candidate.
        """
        fits = conf.ndim == 3 and loc.shape == (len(sizes), len(priors), 4)
        if not fits or conf.shape[:2] != loc.shape[:2] or conf.shape[2] < 2:
            raise ValueError(f"loc {list(loc.shape)}, conf {list(conf.shape)}, {len(priors)} "
                             f"priors and {len(sizes)} image sizes do not fit together")
        if loc.device.type == "mps":  # lacks float64, and operations of some routines
            loc, conf, priors = loc.cpu(), conf.cpu(), priors.cpu()
        image, prior = self._candidates(conf).nonzero(as_tuple=True)
        scores = conf[image, prior].float().softmax(1)
        over = scores[:, 1:] > self.config.conf_thresh
        if self.config.background_shortcut:
            over &= scores[:, :1] < BACKGROUND_SURE
        row, label = over.nonzero(as_tuple=True)
        scale = torch.tensor(sizes, dtype=torch.float32, device=loc.device).reshape(-1, 2)
        offsets = loc[image, prior].float()
        boxes = decode(offsets, priors[prior].float(), self.variance)
        boxes = (boxes * scale.repeat(1, 2)[image])[row]
        if not (boxes.isfinite() & offsets[row].isfinite()).all():  # decode limits the sides
            raise FloatingPointError("loc contains NaN or infinity")
        image, label = image[row], label + 1
        found, score = self.suppress(boxes, scores[row, label], image, label, conf.shape[2])
        counts = torch.bincount(image[found], minlength=len(sizes)).tolist()
        columns = {"boxes": boxes[found], "scores": score, "labels": label[found]}
        if with_priors:
            columns["priors"] = prior[row[found]]
        parts = zip(*(column.split(counts) for column in columns.values()), strict=True)
        most = self.config.top_k
        return [dict(zip(columns, (x[:most] for x in each), strict=True)) for each in parts]

    def suppress(self, boxes: Tensor, scores: Tensor, image: Tensor, label: Tensor,
                 classes: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the boxes that are kept, by image, then score; and their scores.

        Args:
            boxes: [N, 4] corners in pixels; N may be 0.
            scores, image, label: [N]; label in 1..classes-1.
        """
        config = self.config
        group = image * classes + label
        groups, limit = group, config.per_class
        if config.class_agnostic:
            groups, limit = image, max(len(boxes), 1)
        found, score = batched_nms(boxes, scores, groups, config.nms_thresh, limit,
                                   method=SUPPRESSION[config.nms], min_score=config.conf_thresh)
        if config.class_agnostic:
            within = rank_in_group(group[found]) < config.per_class
            found, score = found[within], score[within]
        by_image = image[found].argsort(stable=True)  # keeps the order by score
        return found[by_image], score[by_image]

    def _candidates(self, conf: Tensor) -> Tensor:
        """Return bool [B, P]: all priors that can exceed the score threshold, and few others.

        The score of a class is at most 1 / (1 + exp(background - class)) of the logits. So the
        largest logit is enough to decide, in a fraction of softmax's time.
        """
        background, best = conf[..., 0].float(), conf[..., 1:].amax(2).float()
        if not ((best < torch.inf) & (background < torch.inf)).all():
            raise FloatingPointError("conf contains NaN or +infinity")
        threshold = self.config.conf_thresh
        if threshold <= 0:
            return torch.ones_like(best, dtype=torch.bool)
        if threshold >= 1:
            return torch.zeros_like(best, dtype=torch.bool)
        rest = 1 - threshold
        margin = 0.01 + 1e-6 / rest  # in logits; larger than the rounding of scores
        return best - background > math.log(threshold / rest) - margin
