"""Loading order, and the two loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TINY

import models
from data.config import INPUT_MEAN, VOC_300
from data.detections import load_detections, save_detections
from data.loading import EpochSampler, TestSet, TrainingSet, detection_collate, training_loader
from data.transforms import SSDAugmentation, TestTransform
from data.voc0712 import VOCDetection
from layers import Detect, MultiBoxLoss, PriorBox
from models import build_net
from utils.engine import NonFiniteLoss, detect_all, to_input, train_steps
from utils.errors import UserError

# ---------------------------------------------------------------- loading


def test_collate_keeps_an_image_without_boxes():
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(2)]
    targets = [np.zeros((0, 5), np.float32), np.ones((2, 5), np.float32)]
    stacked, boxes = detection_collate(list(zip(images, targets, strict=True)))
    assert stacked.shape == (2, 3, 4, 4)
    assert stacked.dtype == torch.uint8
    assert (stacked[1] == 1).all()
    assert [b.shape for b in boxes] == [(0, 5), (2, 5)]


def test_every_epoch_shuffles_anew_and_leaves_the_small_rest_out():
    sampler = EpochSampler(10, 3, seed=5)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert [len(batch) for batch in first] == [3, 3, 3]
    used = [index for batch in first for _, index in batch]
    assert len(set(used)) == 9
    sampler.set_epoch(1, 0)
    second = list(sampler)
    assert [i for b in second for _, i in b] != used
    assert {epoch for batch in second for epoch, _ in batch} == {1}


def test_sampler_starts_where_an_interrupted_epoch_stopped():
    sampler = EpochSampler(10, 3, seed=5)
    sampler.set_epoch(4, 0)
    whole = list(sampler)
    sampler.set_epoch(4, 2)
    assert list(sampler) == whole[2:]


def test_data_set_smaller_than_a_batch_is_one_batch():
    sampler = EpochSampler(2, 32, seed=0)
    assert len(sampler) == 1
    assert [len(batch) for batch in sampler] == [2]


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_changes_no_sample(voc_folder, workers):
    dataset = VOCDetection(voc_folder, [(None, "trainval")])

    def batches(workers):
        sampler = EpochSampler(len(dataset), 2, seed=3)
        samples = TrainingSet(dataset, SSDAugmentation(300), seed=3)
        loader = training_loader(samples, sampler, workers, pin_memory=False)
        found = []
        for epoch in range(2):
            sampler.set_epoch(epoch, 0)
            found += list(loader)
        return found

    for (a, ta, ia), (b, tb, ib) in zip(batches(0), batches(workers), strict=True):
        assert ia == ib
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(ta, tb, strict=True))


def test_samples_differ_between_epochs_and_seeds(voc_folder):
    dataset = VOCDetection(voc_folder, [(None, "trainval")])
    pictures = [
        TrainingSet(dataset, SSDAugmentation(300), seed)[epoch, 0][0]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert not np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_test_sample_knows_the_size_of_its_picture(voc_folder):
    dataset = VOCDetection(voc_folder, [(None, "test")])
    image, size = TestSet(dataset, TestTransform(300))[0]
    assert image.shape == (300, 300, 3)
    assert size.tolist() == [96, 72]


# ---------------------------------------------------------------- loops


@pytest.fixture
def tiny_net(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    torch.manual_seed(0)
    return build_net("tiny", 300, 3)


def batch(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 300, 300), generator=generator, dtype=torch.uint8)
    target = torch.tensor([[0.1, 0.2, 0.5, 0.7, 1.0], [0.5, 0.5, 0.9, 0.9, 2.0]])
    return images, [target] * count, list(range(count))


def run(net, batches, lr=1e-3, amp="off"):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    priors = PriorBox(VOC_300)()
    return list(
        train_steps(
            net,
            MultiBoxLoss(3),
            priors,
            batches,
            optimizer,
            scaler,
            [lr] * len(batches),
            INPUT_MEAN,
            amp,
        )  # fmt: skip
    )


def test_input_is_bgr_minus_the_mean():
    image = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    values = to_input(image, INPUT_MEAN, torch.device("cpu")).flatten().tolist()
    assert values == [-104.0, -17.0, 132.0]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_loss_falls_on_a_repeated_batch(tiny_net, amp):
    steps = run(tiny_net, [batch()] * 12, amp=amp)
    losses = [step.loss_loc + step.loss_conf for step in steps]
    assert min(losses[-3:]) < 0.7 * losses[0]
    assert steps[0].lr == 1e-3


def test_one_step_is_sgd_on_the_sum_of_both_losses(tiny_net):
    priors, (images, targets, _) = PriorBox(VOC_300)(), batch()
    before = tiny_net.loc[0].bias.detach().clone()
    outputs = tiny_net(images.float() - torch.tensor(INPUT_MEAN).view(3, 1, 1))
    loss = sum(MultiBoxLoss(3)(outputs, priors, targets))
    (gradient,) = torch.autograd.grad(loss, [tiny_net.loc[0].bias])
    run(tiny_net, [batch()], lr=0.01)
    torch.testing.assert_close(tiny_net.loc[0].bias, before - 0.01 * gradient, rtol=1e-4, atol=1e-6)


def test_loss_that_is_not_finite_stops_before_the_weights_change(tiny_net):
    with torch.no_grad():
        tiny_net.conf[0].bias[0] = float("nan")
    before = [p.detach().clone() for p in tiny_net.parameters()]
    with pytest.raises(NonFiniteLoss) as error:
        run(tiny_net, [(*batch()[:2], [7, 9])])
    assert error.value.indices == [7, 9]
    for p, old in zip(tiny_net.parameters(), before, strict=True):
        assert torch.equal(p.nan_to_num(), old.nan_to_num())


def test_detection_restores_the_mode_and_equals_the_net_by_hand(tiny_net):
    priors, images = PriorBox(VOC_300)(), batch(3)[0]
    sizes = [torch.tensor([640, 480])] * 3
    batches = [(images[:2], sizes[:2]), (images[2:], sizes[2:])]
    seen = []
    tiny_net.train()
    found = detect_all(tiny_net, Detect(), priors, batches, INPUT_MEAN, "off", seen.append)
    assert tiny_net.training
    assert seen == [2, 1]
    with torch.no_grad():
        loc, conf = tiny_net.eval()(to_input(images, INPUT_MEAN, torch.device("cpu")))
    expected = Detect()(loc, conf, priors, [(640, 480)] * 3)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-2)
        np.testing.assert_array_equal(a["labels"], b["labels"])


# ---------------------------------------------------------------- kept detections


def test_detections_round_trip_and_belong_to_what_made_them(tmp_path):
    path = tmp_path / "d.npz"
    rng = np.random.default_rng(0)
    found = [
        {"boxes": rng.random((n, 4), np.float32), "scores": rng.random(n),
         "labels": np.arange(n)}
        for n in (2, 0, 3)
    ]  # fmt: skip
    made_by = {"checkpoint": {"sha256": "ab"}, "sets": "test"}
    save_detections(path, ["a", "b", "ü"], found, made_by)
    loaded, saved_by = load_detections(path, ["a", "b", "ü"], {"sets": "test"})
    assert saved_by == made_by
    for a, b in zip(loaded, found, strict=True):
        for key in b:
            np.testing.assert_array_equal(a[key], b[key].astype(a[key].dtype))
    with pytest.raises(UserError, match=r"'sha256': 'ab'.*not \{'sha256': 'cd'\}"):
        load_detections(path, ["a", "b", "ü"], {"checkpoint": {"sha256": "cd"}})
    with pytest.raises(UserError, match="other pictures"):
        load_detections(path, ["a", "b"], made_by)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:300] + b"x" * 50 + whole[350:], b"\x93NUMPY rubbish"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"d\.npz is damaged"):
            load_detections(path, ["a", "b", "ü"], made_by)
    with pytest.raises(UserError, match="does not exist"):
        load_detections(tmp_path / "x.npz", [], made_by)


def test_no_detections_in_any_picture_round_trip(tmp_path):
    empty = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0), "labels": np.zeros(0)}
    save_detections(tmp_path / "d.npz", [1, 2], [empty] * 2, {})
    loaded, _ = load_detections(tmp_path / "d.npz", [1, 2], {})
    assert [d["boxes"].shape for d in loaded] == [(0, 4)] * 2
