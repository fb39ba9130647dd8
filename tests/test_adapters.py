"""Data sets and detections in other packages' hands, as docs/in_python.md has them."""

import importlib.util
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import blocks
from exports import write_checkpoint
from nms_routines import needs_torchvision
from tiny import TINY

from data import VOCDetection
from data.adapters import TorchvisionDataset
from models import BACKBONES

CODE = blocks("docs/in_python.md", "python")


@pytest.fixture
def voc(voc_folder):
    return VOCDetection(str(voc_folder), [(None, "test")])


@needs_torchvision
def test_samples_have_the_pictures_and_boxes_of_the_reader(voc):
    samples = TorchvisionDataset(voc)
    assert len(samples) == len(voc)
    for i in range(len(voc)):
        image, target = samples[i]
        picture, boxes = voc[i]
        assert image.dtype == torch.uint8
        rgb = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        assert np.array_equal(image.numpy(), rgb.transpose(2, 0, 1))
        assert target["boxes"].tolist() == boxes[:, :4].tolist()
        assert target["boxes"].canvas_size == picture.shape[:2]
        assert target["labels"].tolist() == boxes[:, 4].tolist() and target["image_id"] == i


@needs_torchvision
def test_transforms_move_boxes_with_their_pictures(voc):
    from torchvision.transforms import v2

    plain = TorchvisionDataset(voc)
    moved = TorchvisionDataset(voc,
                               v2.Compose([v2.RandomHorizontalFlip(p=1), v2.Resize((144, 384))]))
    image, target = plain[0]
    height, width = image.shape[1:]
    other, changed = moved[0]
    assert other.shape == (3, 144, 384)
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    expected = torch.stack([width - x2, y1, width - x1, y2], 1)
    expected *= torch.tensor([384 / width, 144 / height]).repeat(2)
    torch.testing.assert_close(changed["boxes"].as_subclass(torch.Tensor), expected)
    assert torch.equal(changed["labels"], target["labels"])


@needs_torchvision
def test_the_page_does_what_it_says(voc_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    write_checkpoint(tmp_path / "best.pth", voc_folder)
    (tmp_path / "FOLDER").symlink_to(voc_folder)
    (tmp_path / "street.jpg").symlink_to(voc_folder / "JPEGImages" / "t1.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    ran = set()
    for block in CODE:
        packages = re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE)
        if all(importlib.util.find_spec(name) for name in packages):
            exec(block, names)
            ran |= set(packages)
    assert {"inference", "torchvision", "data"} <= ran
    found = names["found"]
    assert len(found["boxes"]) > 0
    assert names["drawn"].shape == names["rgb"].shape
    assert names["image"].shape == (3, 300, 300) and names["image"].dtype == torch.float32
    if "torchmetrics" in ran:
        assert float(names["metric"].compute()["map"]) == pytest.approx(1)
    if "supervision" in ran:
        detections = names["detections"]
        assert np.array_equal(detections.xyxy, found["boxes"].numpy())
        assert np.array_equal(detections.confidence, found["scores"].numpy())
        assert list(detections.data["class_name"]) == found["names"]
        assert len(names["sliced"]) > 0
