"""The data sets of this project for code that is written for torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset


class TorchvisionDataset(Dataset):
    """Samples that ``torchvision.transforms.v2`` transforms, boxes and all.

    Args of the constructor:
        dataset: a ``VOCDetection`` or ``COCODetection``.
        transforms: from such a sample to another, e.g. a ``v2.Compose``; None: as they are.

    A sample is (image, target): uint8 ``tv_tensors.Image`` [3, H, W], RGB, and a dict of "boxes",
    ``tv_tensors.BoundingBoxes`` float32 [n, 4] in XYXY format, "labels" int64 [n] in 1..C (0 is the
    background), and "image_id", the sample's index. n may be 0. These are the targets that
    torchvision's own detectors are trained on.
    """

    def __init__(self, dataset, transforms: Callable | None = None) -> None:
        self.dataset = dataset
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        from torchvision import tv_tensors

        picture, target = self.dataset.pull_image(index), self.dataset.target(index)
        rgb = np.ascontiguousarray(picture[..., ::-1].transpose(2, 0, 1))
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(target[:, :4].copy()), format="XYXY", canvas_size=picture.shape[:2]
        )
        labels = torch.from_numpy(target[:, 4].astype(np.int64))
        sample = tv_tensors.Image(rgb), {"boxes": boxes, "labels": labels, "image_id": index}
        return sample if self.transforms is None else self.transforms(*sample)
