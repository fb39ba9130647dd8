"""From network outputs to detections in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers.boxes import decode


class Detect(nn.Module):
    """Softmax, score threshold, decoding, non-maximum suppression, limits per class and image.

    Args of the constructor:
        conf_thresh: a class's score must be above it.
        nms_thresh: IoU (pixel convention) above which the lower-scored box of a class is dropped.
        per_class: most detections kept per class and image.
        top_k: most detections kept per image.
        variance: of the encoding.
    """

    def __init__(
        self,
        conf_thresh: float = 0.02,
        nms_thresh: float = 0.45,
        per_class: int = 50,
        top_k: int = 200,
        variance: tuple[float, float] = (0.1, 0.2),
    ):
        super().__init__()
        self.conf_thresh = conf_thresh
        self.nms_thresh = nms_thresh
        self.per_class = per_class
        self.top_k = top_k
        self.variance = variance

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
            to it), "scores" float32 [n], "labels" int64 [n] in 1..C-1; best score first. n may
            be 0.

        Raises:
            ValueError: ``loc``, ``conf``, ``priors`` and ``sizes`` that do not fit together.
        """
        if not len(loc) == len(conf) == len(sizes) or loc.shape[1] != priors.shape[0]:
            raise ValueError(
                f"loc {list(loc.shape)}, conf {list(conf.shape)}, {priors.shape[0]} priors and "
                f"{len(sizes)} image sizes do not fit together"
            )
        scores = conf.float().softmax(2)
        boxes = decode(loc.float(), priors, self.variance)
        scale = torch.tensor(sizes, dtype=torch.float32, device=loc.device).reshape(-1, 2)
        boxes = boxes * torch.cat([scale, scale], 1)[:, None]
        return [self._image(b, s) for b, s in zip(boxes, scores, strict=True)]

    def _image(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        from utils.nms import class_nms

        prior, label = (scores[:, 1:] > self.conf_thresh).nonzero(as_tuple=True)
        label = label + 1
        score, box = scores[prior, label], boxes[prior]
        keep = class_nms(box, score, label, self.nms_thresh, self.per_class)[: self.top_k]
        return {"boxes": box[keep], "scores": score[keep], "labels": label[keep]}
