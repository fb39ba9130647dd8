"""The learning rate, the optimiser's parameter groups, and the moving average of weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from data.config import VOC_300
from engine.optim import (
    COSINE_END,
    MovingAverage,
    build_optimizer,
    freeze,
    lr_at,
    parameter_groups,
)
from engine.options import Options
from engine.resolve import resolve
from engine.steps import TrainStep
from layers import MultiBoxLoss, PriorBox
from models import build_net
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")


def rate(step, epochs=150, warm_epochs=1, schedule="steps"):
    recipe = Options(max_epoch=epochs, warm_epoch=warm_epochs, schedule=schedule)
    return lr_at(step, 100, recipe)


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_warm_up_is_linear_from_the_start_rate(schedule):
    assert rate(0, schedule=schedule) == 1e-6
    assert rate(50, schedule=schedule) == pytest.approx((1e-6 + 4e-3) / 2)
    assert rate(100, schedule=schedule) == 4e-3
    assert rate(0, warm_epochs=0, schedule=schedule) == 4e-3


def test_the_published_recipe_starts_at_its_full_rate_and_a_stored_warm_up_stays():
    """The published default, `-we 1`, warms no epoch; it was 1 here, too, in older checkpoints."""
    assert [lr_at(step, 10, resolve({})) for step in (0, 9, 10)] == [4e-3] * 3
    assert lr_at(0, 10, resolve({"recipe": "modern"})) == 1e-6
    resumed = resolve({}, {"recipe": "published", "warm_epoch": 1})
    assert [lr_at(step, 10, resumed) for step in (0, 10)] == [1e-6, 4e-3]


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
    (everything,) = parameter_groups(net, Options())
    assert len(everything["params"]) == len(list(net.parameters()))
    assert everything["weight_decay"] == 5e-4
    decaying, others = parameter_groups(net, Options(norm_decay=False))
    assert (decaying["weight_decay"], others["weight_decay"]) == (5e-4, 0)
    convolutions = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for p in decaying["params"]} == {id(p) for p in convolutions}
    rest = {id(p) for p in net.parameters()} - {id(p) for p in convolutions}
    assert {id(p) for p in others["params"]} == rest


@pytest.mark.parametrize(("parts", "kept"), [
    ("base", "base."), ("base:2", ("base.0.", "base.1.")), ("heads", ("loc.", "conf.")),
])
def test_frozen_parts_stay_as_they_are(parts, kept):
    """Bit for bit, with weight decay, batch statistics and a moving average of everything."""
    torch.manual_seed(0)
    net = build_net("tiny", 300, 3)
    options = Options(freeze=parts, optimizer="adamw", weight_decay=0.5)
    before = copy.deepcopy(net.state_dict())
    frozen = freeze(net, parts)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    counted = sum(p.numel() for k, p in net.named_parameters() if not k.startswith(kept))
    assert trained == counted < sum(p.numel() for p in net.parameters())
    average, priors = MovingAverage(net, 0.5), PriorBox(VOC_300)()
    step = TrainStep(net, MultiBoxLoss(3), priors, build_optimizer(net, options), frozen=frozen)
    images = torch.randint(0, 256, (2, 3, 300, 300), dtype=torch.uint8)
    for _ in range(2):
        step([(images, [torch.tensor([[0.1, 0.2, 0.6, 0.7, 1.0]])] * 2, [0, 1])], 1e-2)
        average.update(net)
    for found in (net.state_dict(), average.net.state_dict()):
        changed = {key for key, value in found.items() if not torch.equal(value, before[key])}
        assert changed and not any(key.startswith(kept) for key in changed)
    with pytest.raises(UserError, match="base:4.* 3 layers"):
        freeze(net, "base:4")


def test_base_network_has_a_learning_rate_of_its_own():
    net = build_net("tiny", 300, 3)
    optimizer = build_optimizer(net, Options(base_lr=0.1, momentum=0, weight_decay=0))
    before = copy.deepcopy(net.state_dict())
    step = TrainStep(net, MultiBoxLoss(3), PriorBox(VOC_300)(), optimizer)
    images = torch.zeros(1, 3, 300, 300, dtype=torch.uint8)
    step([(images, [torch.tensor([[0.1, 0.2, 0.6, 0.7, 1.0]])], [0])], 1e-3)
    for key, parameter in net.named_parameters():
        rate = 1e-4 if key.startswith("base.") else 1e-3
        torch.testing.assert_close(parameter, before[key] - rate * parameter.grad)


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
