"""One training step, and detection over a data set."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import TINY
from torch.utils._python_dispatch import TorchDispatchMode

import models
from data.config import INPUT_MEAN, VOC_300
from engine.optim import MovingAverage, build_optimizer
from engine.options import Options
from engine.steps import TrainStep, detect_all
from layers import Detect, MultiBoxLoss, PriorBox
from models import build_net
from utils.device import to_input

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


def run(net, batches, lr=1e-3, accumulate=1, stops=None, **options):
    """One step from every ``accumulate`` batches."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    step = TrainStep(net, MultiBoxLoss(3), PriorBox(VOC_300)(), optimizer, **options)
    parts = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    stops = stops or [False] * len(parts)
    return [step(part, lr, stop) for part, stop in zip(parts, stops, strict=True)]


def test_input_is_bgr_minus_the_mean():
    image = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    values = to_input(image, INPUT_MEAN, torch.device("cpu")).flatten().tolist()
    assert values == [-104.0, -17.0, 132.0]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_loss_falls_on_a_repeated_batch(tiny_net, amp):
    steps = run(tiny_net, [batch()] * 12, amp=amp)
    losses = [sum(step.results()[:2]) for step in steps]
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


def without_batch_norm(net):
    """Its statistics are of a part alone, whatever becomes of the gradients."""
    net.base[1] = torch.nn.Identity()
    return net


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_takes_the_step_of_the_whole(tiny_net, accumulate):
    net = without_batch_norm(tiny_net)
    images, targets, indices = batch(4)
    # The parts have different numbers of boxes, and one has none at all.
    targets = [targets[0], torch.zeros(0, 5), targets[0][:1], targets[0][1:]]
    other = copy.deepcopy(net)
    (whole,) = run(net, [(images, targets, indices)], lr=1e-4)
    size = 4 // accumulate
    parts = [
        (images[i : i + size], targets[i : i + size], indices[i : i + size])
        for i in range(0, 4, size)
    ]
    (cut,) = run(other, parts, lr=1e-4, accumulate=accumulate)
    assert cut.results()[:2] == pytest.approx(whole.results()[:2], rel=1e-5)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradient_is_clipped_to_its_norm(tiny_net):
    lr, before = 0.01, [p.detach().clone() for p in tiny_net.parameters()]
    run(tiny_net, [batch()], lr=lr, clip_norm=0.5)
    moved = [(p - old).flatten() for p, old in zip(tiny_net.parameters(), before, strict=True)]
    # The first step of SGD is the gradient times the rate.
    assert torch.cat(moved).norm().item() == pytest.approx(lr * 0.5, rel=1e-3)


def test_a_step_tells_whether_to_stop_and_a_loss_that_is_not_finite(tiny_net):
    first, second = run(tiny_net, [batch()] * 2, stops=[False, True])
    assert (first.results()[2], second.results()[2]) == (False, True)
    with torch.no_grad():
        tiny_net.conf[0].bias[0] = float("nan")
    (third,) = run(tiny_net, [batch()])
    assert np.isnan(third.results()[1])


class WithoutFloat64(TorchDispatchMode):
    """Let the device "meta" refuse float64, as Apple's GPU does; what comes back from it is 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros_like(args[0], device="cpu")
        made = func(*args, **kwargs)
        for each in made if isinstance(made, tuple | list) else [made]:
            assert not (getattr(each, "is_meta", False) and each.dtype == torch.float64), func
        return made


def test_training_makes_no_float64_on_its_device(tiny_net, monkeypatch):
    monkeypatch.setattr("engine.steps.autocast", lambda *_: nullcontext())
    with WithoutFloat64():
        net, priors = tiny_net.to("meta"), PriorBox(VOC_300).to("meta")()
        with pytest.raises(AssertionError, match="aten"):
            priors.double()
        optimizer = build_optimizer(net, Options(optimizer="adamw"))
        TrainStep(net, MultiBoxLoss(3), priors, optimizer, clip_norm=1)([batch()], 1e-3)
        MovingAverage(net, 0.9).update(net)


def test_detection_restores_the_mode_and_equals_the_net_by_hand(tiny_net):
    priors, images = PriorBox(VOC_300)(), batch(3)[0]
    sizes = [torch.tensor([640, 480])] * 3
    batches = [(images[:2], sizes[:2]), (images[2:], sizes[2:])]
    seen = []
    tiny_net.train()
    found = detect_all(tiny_net, Detect(), priors, batches, "off", seen.append)
    assert tiny_net.training
    assert seen == [2, 1]
    with torch.no_grad():
        loc, conf = tiny_net.eval()(to_input(images, INPUT_MEAN, torch.device("cpu")))
    expected = Detect()(loc, conf, priors, [(640, 480)] * 3)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-2)
        np.testing.assert_array_equal(a["labels"], b["labels"])
