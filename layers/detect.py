"""From network outputs to detections in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.boxes import decode

SUPPRESSION = {"hard": "hard", "soft": "linear", "soft-gaussian": "gaussian"}
"""Values of Detect's ``nms`` -> methods of ``utils.nms.batched_nms``."""

# A prior whose background score is at least this has no detections under the shortcut.
BACKGROUND_SURE = 0.9


class Detect(nn.Module):
    """Softmax, score threshold, decoding, non-maximum suppression, limits per class and image.

    A batch takes the same steps as its images one by one, all its images and classes at once. Of
    the priors only those are normalised and decoded that can hold a score over the threshold.

    Args of the constructor:
        conf_thresh: a class's score must be above it.
        nms_thresh: IoU (pixel convention) above which the lower-scored box of a class is dropped.
        per_class: most detections kept per class and image.
        top_k: most detections kept per image.
        variance: of the encoding.
        nms: "hard"; "soft" and "soft-gaussian", Soft-NMS (arXiv 1704.04503) with linear decay above
            ``nms_thresh``, and with Gaussian decay of sigma 0.5; what decays to less than
            ``conf_thresh`` is dropped, and "scores" are the decayed ones.
        class_agnostic: let boxes of different classes suppress each other, too.
        background_shortcut: drop all classes of a prior whose background score is at least 0.9, as
            the authors' later release does. It changes the detections when ``conf_thresh`` is
            below 0.1.

    Raises:
        ValueError: a limit below 1, a threshold outside 0..1, an unknown ``nms``.
    """

    def __init__(
        self,
        conf_thresh: float = 0.02,
        nms_thresh: float = 0.45,
        per_class: int = 50,
        top_k: int = 200,
        variance: tuple[float, float] = (0.1, 0.2),
        nms: str = "hard",
        class_agnostic: bool = False,
        background_shortcut: bool = False,
    ):
        super().__init__()
        if nms not in SUPPRESSION:
            raise ValueError(f"nms is {nms!r}, should be one of {', '.join(SUPPRESSION)}")
        if per_class < 1 or top_k < 1:
            raise ValueError(f"per_class {per_class} and top_k {top_k} should be at least 1")
        if not (0 <= conf_thresh <= 1 and 0 <= nms_thresh <= 1):
            raise ValueError(
                f"conf_thresh {conf_thresh} and nms_thresh {nms_thresh} should be in 0..1"
            )
        self.conf_thresh = conf_thresh
        self.nms_thresh = nms_thresh
        self.per_class = per_class
        self.top_k = top_k
        self.variance = variance
        self.nms = nms
        self.class_agnostic = class_agnostic
        self.background_shortcut = background_shortcut

    @torch.no_grad()
    def forward(
        self, loc: Tensor, conf: Tensor, priors: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections of a batch.

        Args:
            loc: [B, P, 4] encoded offsets.
            conf: [B, P, C] logits, class 0 = background.
            priors: [P, 4], centre-size, relative.
            sizes: (width, height) in pixels of the B images.

        Returns:
            One dict an image: "boxes" float32 [n, 4] corners in pixels of the image (not clipped
            to it), "scores" float32 [n], "labels" int64 [n] in 1..C-1; best score first, of equal
            scores the lower class first, then the earlier prior (class-agnostic: the earlier prior
            first, then the lower class). n may be 0.

        Raises:
            ValueError: ``loc``, ``conf``, ``priors`` and ``sizes`` that do not fit together.
            FloatingPointError: NaN or +infinity in ``conf``; NaN or infinity in ``loc`` where a
                detection would come from.
        """
        from utils.nms import batched_nms

        fits = conf.ndim == 3 and loc.shape == (len(sizes), len(priors), 4)
        if not fits or conf.shape[:2] != loc.shape[:2] or conf.shape[2] < 2:
            raise ValueError(
                f"loc {list(loc.shape)}, conf {list(conf.shape)}, {len(priors)} priors and "
                f"{len(sizes)} image sizes do not fit together"
            )
        image, prior = self._candidates(conf).nonzero(as_tuple=True)
        scores = conf[image, prior].float().softmax(1)
        over = scores[:, 1:] > self.conf_thresh
        if self.background_shortcut:
            over &= scores[:, :1] < BACKGROUND_SURE
        row, label = over.nonzero(as_tuple=True)
        scale = torch.tensor(sizes, dtype=torch.float32, device=loc.device).reshape(-1, 2)
        boxes = decode(loc[image, prior].float(), priors[prior].float(), self.variance)
        boxes = (boxes * scale.repeat(1, 2)[image])[row]
        if not boxes.isfinite().all():
            raise FloatingPointError("loc contains NaN or infinity")
        image = image[row]

        classes = conf.shape[2] - 1
        found, score = batched_nms(
            boxes,
            scores[row, label + 1],
            image if self.class_agnostic else image * classes + label,
            self.nms_thresh,
            max(len(boxes), 1) if self.class_agnostic else self.per_class,
            method=SUPPRESSION[self.nms],
            min_score=self.conf_thresh,
        )
        if self.class_agnostic:
            within = rank_in_group(image[found] * classes + label[found]) < self.per_class
            found, score = found[within], score[within]
        by_image = image[found].argsort(stable=True)  # of each still the best first
        found, score = found[by_image], score[by_image]
        counts = torch.bincount(image[found], minlength=len(sizes)).tolist()
        parts = (boxes[found], score, label[found] + 1)
        return [
            {
                "boxes": box[: self.top_k],
                "scores": value[: self.top_k],
                "labels": name[: self.top_k],
            }
            for box, value, name in zip(*(part.split(counts) for part in parts), strict=True)
        ]

    def _candidates(self, conf: Tensor) -> Tensor:
        """bool [B, P]: all priors that can have a score over the threshold, and few others.

        A class's score is at most 1 / (1 + exp(background - class)) of the logits, so the largest
        tells enough, at a fraction of what softmax takes.
        """
        background, best = conf[..., 0].float(), conf[..., 1:].amax(2).float()
        if not ((best < torch.inf) & (background < torch.inf)).all():
            raise FloatingPointError("conf contains NaN or +infinity")
        if self.conf_thresh <= 0:
            return torch.ones_like(best, dtype=torch.bool)
        if self.conf_thresh >= 1:
            return torch.zeros_like(best, dtype=torch.bool)
        rest = 1 - self.conf_thresh
        margin = 0.01 + 1e-6 / rest  # more than the scores' rounding, in logits
        return best - background > math.log(self.conf_thresh / rest) - margin


def rank_in_group(groups: Tensor) -> Tensor:
    """int64 [n]: how many earlier entries of ``groups`` [n] are of the same group."""
    ordered, order = groups.sort(stable=True)
    position = torch.arange(groups.shape[0], device=groups.device)  # len() would be exported fixed
    return (position - torch.searchsorted(ordered, ordered))[order.argsort()]
