"""The learning rate, the optimiser's parameter groups, and the moving average of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from engine.optim import COSINE_END, MovingAverage, ema_decay_at, lr_at, parameter_groups
from engine.options import Options
from models import build_net


def rate(step, epochs=150, warm_epochs=1, schedule="steps"):
    recipe = Options(max_epoch=epochs, warm_epoch=warm_epochs, schedule=schedule)
    return lr_at(step, 100, recipe)


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_warm_up_is_linear_from_the_start_rate(schedule):
    assert rate(0, schedule=schedule) == 1e-6
    assert rate(50, schedule=schedule) == pytest.approx((1e-6 + 4e-3) / 2)
    assert rate(100, schedule=schedule) == 4e-3
    assert rate(0, warm_epochs=0, schedule=schedule) == 4e-3


def test_rate_falls_tenfold_at_60_80_and_90_percent_of_the_epochs():
    for epoch, factor in ((90, 0.1), (120, 0.01), (135, 0.001)):
        assert rate(epoch * 100 - 1) == pytest.approx(4e-3 * factor * 10)
        assert rate(epoch * 100) == pytest.approx(4e-3 * factor)
    assert rate(149 * 100 + 99) == pytest.approx(4e-6)


def test_cosine_is_that_of_pytorch():
    epochs, warm = 6, 2
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=4e-3)
    reference = CosineAnnealingLR(optimizer, (epochs - warm) * 100, eta_min=4e-3 * COSINE_END)
    for step in range(warm * 100, epochs * 100):
        ours = rate(step, epochs=epochs, warm_epochs=warm, schedule="cosine")
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


def test_norms_and_biases_are_the_group_that_does_not_decay():
    net = build_net("SSD_HarDNet68", 300, 4)
    (everything,) = parameter_groups(net, 5e-4, norm_decay=True)
    assert len(everything["params"]) == len(list(net.parameters()))
    assert everything["weight_decay"] == 5e-4
    decaying, others = parameter_groups(net, 5e-4, norm_decay=False)
    assert (decaying["weight_decay"], others["weight_decay"]) == (5e-4, 0)
    convolutions = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for p in decaying["params"]} == {id(p) for p in convolutions}
    rest = {id(p) for p in net.parameters()} - {id(p) for p in convolutions}
    assert {id(p) for p in others["params"]} == rest


@pytest.mark.parametrize("decay", [0.5, 0.9998])
def test_average_is_the_weighted_sum_of_all_weights_so_far(decay):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    average = MovingAverage(net, decay)
    expected = {key: value.double() for key, value in copy.deepcopy(net.state_dict()).items()}
    for update in range(20):
        net.train()(torch.randn(4, 2, 3, 3))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(net)
        kept = min(decay, (1 + update) / (10 + update))
        for key, value in net.state_dict().items():
            expected[key] = kept * expected[key] + (1 - kept) * value.double()
    for key, value in average.net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value == 20
        else:
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    assert average.updates == 20
    assert not any(p.requires_grad for p in average.net.parameters())


def test_decay_of_the_average_grows_to_the_one_asked_for():
    assert ema_decay_at(0, 0.9998) == 0.1
    assert ema_decay_at(90, 0.9998) == pytest.approx(0.91)
    assert ema_decay_at(44_000, 0.9998) < ema_decay_at(45_000, 0.9998) == 0.9998
