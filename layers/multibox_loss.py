"""The multibox loss (SSD, section 2.2, "Training objective" and "Hard negative mining")."""

import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.matching import match, pad_targets

NEGATIVES = 3  # of an image, for each positive prior


class MultiBoxLoss(nn.Module):
    """Smooth-L1 on the offsets of positive priors, cross-entropy on positives and hard negatives.

    Both are sums divided by the number of positive priors in the batch. The hard negatives of an
    image are the non-positive priors with the highest confidence loss, three for each positive;
    ties: earlier prior. So an image without objects has none, as published: it adds no gradient.
    With ``least_negatives`` N, an image has at least N of them, and counts as at least N / 3
    (rounded down) positives in the divisor.

    A call matches and computes the losses. If a batch comes in parts (accumulation steps,
    processes), call ``match`` for every part, add up ``count``, and call ``loss`` with the sum.
    Neither synchronises with a GPU, forward or backward.
    """

    def __init__(self, num_classes: int, threshold: float = 0.5,
                 variance: tuple[float, float] = (0.1, 0.2), least_negatives: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.threshold = threshold
        self.variance = variance
        self.least_negatives = least_negatives

    def forward(self, predictions: tuple[Tensor, Tensor], priors: Tensor,
                targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the two losses of a batch.

        Args:
            predictions: ``loc`` [B, P, 4] and ``conf`` [B, P, num_classes] logits, any float type;
                the loss is computed in float32, or in float64 for float64.
            priors: [P, 4], centre-size, relative.
            targets: B tensors [n, 5] on the CPU, corners relative to the image and a label in
                1..num_classes-1. n may be 0.

        Returns:
            (loss_loc, loss_conf), float32 scalars. A batch without a positive prior has loss 0
            and zero gradients, not NaN.

        Raises:
            ValueError: shapes that do not fit together, or a label out of range.
        """
        self._check(predictions, len(targets), len(priors))
        labels, offsets = self.match(targets, priors)
        return self.loss(predictions, labels, offsets, self.count(labels))

    @torch.no_grad()
    def match(self, targets: Sequence[Tensor], priors: Tensor) -> tuple[Tensor, Tensor]:
        """Return what every prior should predict; arguments and errors are those of a call.

        Returns:
            ``labels`` int64 [B, P], 0 = background, and ``offsets`` float32 [B, P, 4], which have
            no meaning where the label is 0. Both are on the device of ``priors``.
        """
        for i, target in enumerate(targets):
            if target.ndim != 2 or target.shape[1] != 5:
                raise ValueError(f"target {i} has shape {list(target.shape)}, expected [n, 5]")
            if len(target) and not 1 <= target[:, 4].min() <= target[:, 4].max() < self.num_classes:
                raise ValueError(f"target {i} has a label outside 1..{self.num_classes - 1}: "
                                 f"{target[:, 4].tolist()}")
        boxes = pad_targets(targets, priors.device)
        return match(boxes, priors, self.threshold, self.variance, index=priors.is_cpu)

    def count(self, labels: Tensor) -> Tensor:
        """Return the positives that images count as, int64 0-d, given the labels of ``match``."""
        return (labels > 0).sum(1).clamp(min=self.least_negatives // NEGATIVES).sum()

    def loss(self, predictions: tuple[Tensor, Tensor], labels: Tensor, offsets: Tensor,
             count: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return the two losses of a call, given the result of ``match``.

        The sums are divided by ``count``, that of the whole batch (by 1 if it is 0): a 0-d tensor
        on the device of the predictions, or a number.
        """
        loc, conf = predictions
        self._check(predictions, *labels.shape)
        loss_loc = _location_loss(loc, labels, offsets, conf.is_cpu)
        loss_conf = _ConfidenceLoss.apply(conf, labels, self.least_negatives, conf.is_cpu)
        count = torch.as_tensor(count).clamp(min=1)
        return loss_loc / count, loss_conf / count

    def _check(self, predictions: tuple[Tensor, Tensor], batch: int, priors: int) -> None:
        loc, conf = predictions
        if loc.shape != (batch, priors, 4) or conf.shape != (batch, priors, self.num_classes):
            raise ValueError(f"loc {list(loc.shape)} and conf {list(conf.shape)} do not fit "
                             f"{batch} targets, {priors} priors and {self.num_classes} classes")


# Both sums below can be computed in two ways, with equal results. With `index` they gather the few
# rows that count, which is faster on the CPU; a GPU would have to wait for their number. Without it
# they mask the other rows.


def _location_loss(loc: Tensor, labels: Tensor, offsets: Tensor, index: bool) -> Tensor:
    """Return the sum of smooth-L1 over the positive priors."""
    positive = labels > 0
    if index:
        loc, offsets = loc[positive], offsets[positive]
    else:
        loc = torch.where(positive[..., None], loc, offsets)
    return F.smooth_l1_loss(loc.to(_precision(loc)), offsets, reduction="sum")


class _ConfidenceLoss(torch.autograd.Function):
    """Sum of the cross-entropy over positive priors and hard negatives.

    Mining and loss share one pass over ``conf``. No tensor of its size is saved for the backward
    pass but ``conf`` itself.
    """

    @staticmethod
    def forward(ctx, conf: Tensor, labels: Tensor, least: int, index: bool) -> Tensor:
        losses = torch.empty(labels.shape, dtype=_precision(conf), device=conf.device)
        for part in _parts(conf):
            likelihood = conf[part].log_softmax(-1, dtype=losses.dtype)
            losses[part] = likelihood.gather(-1, labels[part][..., None]).squeeze(-1).neg_()
        chosen = (labels > 0) | _hard_negatives(losses, labels, least, index)
        ctx.index = index
        rows = chosen.flatten().nonzero().squeeze(1) if index else chosen
        ctx.save_for_backward(conf, labels, rows)
        return losses.flatten()[rows].sum() if index else torch.where(chosen, losses, 0).sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("MultiBoxLoss has no second derivative: no create_graph=True")
        conf, labels, chosen = ctx.saved_tensors
        if ctx.index:
            result = _zeros_like(conf)
            rows = _gradient(conf.flatten(0, 1)[chosen], labels.flatten()[chosen], grad)
            result.flatten(0, 1)[chosen] = rows.to(conf.dtype)
            return result, None, None, None
        result = torch.empty_like(conf)
        for part in _parts(conf):
            rows = _gradient(conf[part], labels[part], grad)
            result[part] = torch.where(chosen[part][..., None], rows, 0)
        return result, None, None, None


def _zeros_like(x: Tensor) -> Tensor:
    """Return contiguous zeros on the CPU, for a gradient of which few rows are not zero.

    The system gives zeroed pages, a page when it is written. Zeros of PyTorch are written at once:
    matching and loss of 32 images at 512 with 81 classes took 1.45 times as long with them.
    """
    pages = mmap.mmap(-1, max(x.nbytes, x.itemsize), access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=x.dtype)[: x.numel()].view(x.shape)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parts(conf: Tensor) -> list[slice]:
    """Return slices of a batch: one image on the CPU, where its copy fits into the cache, else as
    many images as have a float32 copy of 256 MB."""
    size = 1 if conf.is_cpu else max(1, 2**26 // conf[0].numel())
    return [slice(start, start + size) for start in range(0, len(conf), size)]


def _gradient(conf: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of each row's cross-entropy, (softmax - one-hot) x ``grad``: [..., C]."""
    rows = conf.softmax(-1, dtype=_precision(conf))
    label = labels[..., None]
    return rows.scatter_(-1, label, rows.gather(-1, label) - 1).mul_(grad)


def _hard_negatives(losses: Tensor, labels: Tensor, least: int, index: bool) -> Tensor:
    """Return bool [B, P]: the non-positive priors with the highest loss, ``least`` or more."""
    positive = labels > 0
    wanted = (NEGATIVES * positive.sum(1, keepdim=True)).clamp(min=least)
    wanted = wanted.clamp(max=labels.shape[1] - 1)
    # NaN counts as a high loss, so that it reaches the sum.
    losses = losses.nan_to_num(torch.inf, torch.inf, -torch.inf).masked_fill(positive, -torch.inf)
    # The highest loss that is not wanted: take the losses above it, and fill up with equal ones.
    if index:
        at = labels.shape[1] - 1 - wanted.squeeze(1)
        rows = zip(losses.numpy(), at.tolist(), strict=True)
        border = losses.new_tensor([np.partition(row, k)[k] for row, k in rows])[:, None]
    else:
        border = losses.sort(1, descending=True).values.gather(1, wanted)
    over, equal = losses > border, losses == border
    room = wanted - over.sum(1, keepdim=True)
    return (over | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))) & ~positive
