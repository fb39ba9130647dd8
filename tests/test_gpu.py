"""What only a CUDA GPU can show: the same numbers as on the CPU, and training at each precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.config import VOC_300
from layers import Detect, MultiBoxLoss, PriorBox
from models import build_net
from utils.checkpoint import load_checkpoint
from utils.nms import class_nms, nms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def exact_float32(monkeypatch):
    """cuDNN's default convolutions are TF32, with a tenth of float32's digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_batch(batch=3, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    priors = PriorBox(VOC_300)()
    loc = torch.randn(batch, len(priors), 4, generator=generator)
    conf = torch.randn(batch, len(priors), classes, generator=generator) * 3
    corners = torch.rand(7, 2, 2, generator=generator).sort(1).values.reshape(7, 4)
    target = torch.cat([corners, torch.randint(1, classes, (7, 1), generator=generator)], 1)
    return loc, conf, priors, [target, torch.zeros(0, 5), target[:2]]


@pytest.mark.parametrize("version", ["SSD_HarDNet68", "SSD_HarDNet85", "SSD_vgg"])
def test_network_gives_the_same_outputs_as_on_the_cpu(version, exact_float32):
    net = build_net(version, 300, 5).eval()
    images = torch.randn(2, 3, 300, 300) * 50
    with torch.no_grad():
        expected = net(images)
        measured = net.cuda()(images.cuda())
    for a, b in zip(measured, expected, strict=True):
        assert (a.cpu() - b).norm() < 1e-4 * b.norm()


def test_loss_and_gradients_equal_the_cpu():
    loc, conf, priors, targets = random_batch()
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in (loc, conf)]
        losses = MultiBoxLoss(5)(inputs, priors.to(device), targets)
        sum(losses).backward()
        results.append([*losses, *(x.grad for x in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.cpu())


def test_detections_equal_the_cpu():
    loc, conf, priors, _ = random_batch()
    sizes = [(640, 480), (300, 300), (33, 900)]
    expected = Detect()(loc, conf, priors, sizes)
    measured = Detect()(loc.cuda(), conf.cuda(), priors.cuda(), sizes)
    for a, b in zip(measured, expected, strict=True):
        assert torch.equal(a["labels"].cpu(), b["labels"])
        torch.testing.assert_close(a["scores"].cpu(), b["scores"])
        torch.testing.assert_close(a["boxes"].cpu(), b["boxes"], rtol=1e-4, atol=1e-2)


def test_nms_of_cuda_tensors_keeps_the_same_boxes():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (500, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (500, 2))], 1)
    dets = torch.from_numpy(np.c_[boxes, rng.random(500)].astype(np.float32))
    kept = nms(dets.cuda(), 0.45)
    assert kept.is_cuda
    assert torch.equal(kept.cpu(), nms(dets, 0.45))
    labels = torch.from_numpy(rng.integers(1, 6, 500))
    arguments = (dets[:, :4].contiguous(), dets[:, 4].contiguous(), labels)
    expected = class_nms(*arguments, 0.45, 20)
    assert torch.equal(class_nms(*(x.cuda() for x in arguments), 0.45, 20).cpu(), expected)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_testing_and_resuming_run_at_each_precision(amp, voc_folder, tmp_path):
    from train_test import main

    common = [
        "-d",
        "VOC",
        "--root",
        str(voc_folder),
        "-s",
        "300",
        "-b",
        "2",
        "--device",
        "cuda",
        "--num_workers",
        "1",
        "--save_folder",
        str(tmp_path),
        "--date",
        "run",
    ]
    assert main([*common, "--amp", amp, "-max", "2", "--max_iters", "1"]) == 0
    assert main([*common, "--resume", "auto"]) == 0
    final = tmp_path / "SSD_HarDNet68_300" / "run" / "Final_SSD_HarDNet68_VOC.pth"
    assert load_checkpoint(final)["config"]["amp"] == amp
    assert main(["--test", str(final), "--device", "cuda", "--num_workers", "1"]) == 0
    # What a GPU wrote, a CPU reads.
    assert main(["--test", str(final), "--device", "cpu", "--num_workers", "0"]) == 0
