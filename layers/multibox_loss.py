"""The multibox loss (SSD, section 2.2, "Training objective" and "Hard negative mining")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.matching import match, pad_targets


class MultiBoxLoss(nn.Module):
    """Smooth-L1 on the offsets of positive priors, cross-entropy on positives and hard negatives.

    Both are sums divided by the number of positive priors in the batch. Hard negatives: per
    image, three times as many non-positive priors as there are positives, those with the highest
    confidence loss.
    """

    def __init__(
        self,
        num_classes: int,
        threshold: float = 0.5,
        negatives_per_positive: int = 3,
        variance: tuple[float, float] = (0.1, 0.2),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.threshold = threshold
        self.negatives_per_positive = negatives_per_positive
        self.variance = variance

    def forward(
        self, predictions: tuple[Tensor, Tensor], priors: Tensor, targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The two losses of a batch.

        Args:
            predictions: ``loc`` [B, P, 4] and ``conf`` [B, P, num_classes] logits, any float type;
                the loss is computed in float32.
            priors: [P, 4], centre-size, relative.
            targets: B tensors [n, 5], corners relative to the image and a label in
                1..num_classes-1. n may be 0.

        Returns:
            (loss_loc, loss_conf), float32 scalars. A batch without a positive prior has loss 0
            and zero gradients, not NaN.

        Raises:
            ValueError: shapes that do not belong together, or a label out of range.
        """
        loc, conf = (p.float() for p in predictions)
        self._check(loc, conf, priors, targets)
        boxes, mask = pad_targets(targets, loc.device)
        with torch.no_grad():
            labels, offsets = match(boxes, mask, priors, self.threshold, self.variance)
            positive = labels > 0
            chosen = positive | self._hard_negatives(conf, labels)
            # max() keeps a batch without positives at 0 / 1 = 0.
            count = positive.sum().clamp(min=1)
        loss_loc = F.smooth_l1_loss(loc[positive], offsets[positive], reduction="sum")
        loss_conf = F.cross_entropy(conf[chosen], labels[chosen], reduction="sum")
        return loss_loc / count, loss_conf / count

    def _hard_negatives(self, conf: Tensor, labels: Tensor) -> Tensor:
        """Bool [B, P]: the non-positive priors with the highest loss, a given number an image."""
        loss = conf.logsumexp(2) - conf.gather(2, labels[..., None]).squeeze(2)
        positive = labels > 0
        loss = loss.masked_fill(positive, -torch.inf)
        wanted = (self.negatives_per_positive * positive.sum(1)).clamp(max=labels.shape[1] - 1)
        order = loss.argsort(dim=1, descending=True, stable=True)
        ranked = torch.arange(labels.shape[1], device=labels.device) < wanted[:, None]
        return torch.zeros_like(positive).scatter(1, order, ranked) & ~positive

    def _check(self, loc: Tensor, conf: Tensor, priors: Tensor, targets: Sequence[Tensor]) -> None:
        batch, expected = len(targets), priors.shape[0]
        if loc.shape != (batch, expected, 4) or conf.shape != (batch, expected, self.num_classes):
            raise ValueError(
                f"loc {list(loc.shape)} and conf {list(conf.shape)} do not fit {batch} targets, "
                f"{expected} priors and {self.num_classes} classes"
            )
        for i, target in enumerate(targets):
            if target.ndim != 2 or target.shape[1] != 5:
                raise ValueError(f"target {i} has shape {list(target.shape)}, expected [n, 5]")
            if len(target) and not 1 <= target[:, 4].min() <= target[:, 4].max() < self.num_classes:
                raise ValueError(
                    f"target {i} has a label outside 1..{self.num_classes - 1}: "
                    f"{target[:, 4].tolist()}"
                )
