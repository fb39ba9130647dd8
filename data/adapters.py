"""The data sets of this project as torchvision's transforms and detectors expect them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from data import DetectionData


@dataclass
class TorchvisionDataset(Dataset):
    """Samples for ``torchvision.transforms.v2``, which transforms images and boxes together.

    A sample is (image, target): uint8 ``tv_tensors.Image`` [3, H, W], RGB, and a dict of "boxes",
    ``tv_tensors.BoundingBoxes`` float32 [n, 4] in XYXY format, "labels" int64 [n] in 1..C (0 is the
    background), and "image_id", the sample's index. n may be 0. torchvision's detectors are trained
    on such targets. ``transforms`` is called as transforms(image, target), e.g. a ``v2.Compose``.
    """

    dataset: DetectionData
    transforms: Callable | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        from torchvision import tv_tensors

        image, target = self.dataset[index]
        rgb = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
        boxes = tv_tensors.BoundingBoxes(torch.from_numpy(target[:, :4].copy()), format="XYXY",
                                         canvas_size=image.shape[:2])
        labels = torch.from_numpy(target[:, 4].astype(np.int64))
        sample = tv_tensors.Image(rgb), {"boxes": boxes, "labels": labels, "image_id": index}
        return sample if self.transforms is None else self.transforms(*sample)
