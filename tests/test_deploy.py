"""Deployed networks compute what the trained ones do."""

import copy

import pytest
import torch
from test_models import golden_weight
from torch import nn

from data.config import VOC_300
from inference.deploy import deploy
from models import BACKBONES, build_net
from models.ssd import SSD, ssd_extras
from tools.traffic import profile


def trained(version: str) -> nn.Module:
    """A network in double precision; none of its weights is 0 or 1, which could hide a mistake."""
    net = build_net(version, 300, 4).eval()
    net.load_state_dict({k: golden_weight(k, tuple(t.shape)) for k, t in net.state_dict().items()})
    return net.double()


IMAGES = torch.rand(1, 3, 300, 300, generator=torch.manual_seed(1), dtype=torch.double) * 99


@torch.inference_mode()
def outputs(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return net(IMAGES.to(next(net.parameters()).dtype))


def error(net: nn.Module, exact: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The largest error of the outputs of ``net``, relative to the largest exact output."""
    pairs = zip(outputs(net), exact, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


QUICK = ("SSD_HarDNet68", "SSD_HarDNet39ds", "SSD_HarDNet39dsbn", "SSD_mobile", "RFB_HarDNet68")
SLOW = [pytest.param(v, marks=pytest.mark.slow) for v in BACKBONES if v not in QUICK]


@pytest.mark.parametrize("version", [*QUICK, *SLOW])
def test_deployed_network_equals_the_trained_one(version):
    net = trained(version)
    before = copy.deepcopy(net.state_dict())
    deployed, exact = deploy(net), outputs(net)
    assert error(deployed, exact) < 1e-11
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
    assert deployed.num_classes == 4 and not any(p.requires_grad for p in deployed.parameters())
    # The network itself is as it was.
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    if version in ("SSD_HarDNet68", "SSD_HarDNet39ds"):
        # In single precision it is no farther from the exact outputs, which may be far.
        single = copy.deepcopy(net).float()
        assert error(deploy(single), exact) < max(1e-5, 2 * error(single, exact))


def test_what_is_moved():
    """Of SSD512-HarDNet68, in elements; docs/traffic.md has the figures of the plain network."""
    net = build_net("SSD_HarDNet68", 512, 81)
    plain, deployed = profile(net, 512), profile(deploy(net), 512)
    assert plain.macs == deployed.macs
    # One head instead of two reads each source map.
    sources = [64 * 64 * 320, 32 * 32 * 640, 16 * 16 * 512, *(256 * n * n for n in (8, 4, 2, 1))]
    assert deployed.cio == plain.cio - sum(sources)
    assert deployed.concat == plain.concat == 58_820_616


def test_a_network_may_be_deployed_in_inference_mode():
    net = trained("SSD_HarDNet39ds")
    with torch.inference_mode():
        deployed = deploy(net)
    assert error(deployed, outputs(net)) < 1e-11


def test_half_precision_takes_images_as_they_come():
    net = trained("SSD_HarDNet39ds").float()
    half = deploy(net).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        found = half(IMAGES.float())
    for output, whole in zip(found, outputs(net), strict=True):
        assert output.dtype == torch.bfloat16
        assert (output - whole).norm() < 0.05 * whole.norm()


ODD = {
    "norm first": lambda m, x: m.conv(torch.relu(m.norm(x.relu()))), "activation between": lambda m,
    x: m.norm(torch.relu_(m.conv(x))), "another reader": lambda m, x: (y := m.conv(x)) + m.norm(y),
    "convolution twice": lambda m, x: m.norm(m.conv(torch.relu(m.conv(x)))), "norm twice": lambda m,
    x: m.norm(m.conv(m.norm(m.other(x)))),
}


@pytest.mark.parametrize("order", ODD)
def test_a_batch_norm_without_a_convolution_of_its_own_is_refused(order):
    class Odd(nn.Module):
        """Registered as if it were foldable."""

        out_channels = (4, 4)

        def __init__(self):
            super().__init__()
            self.start = nn.Conv2d(3, 4, 3, 8, 1)
            self.other = nn.Conv2d(4, 4, 3, padding=1)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.down = nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x):
            x = ODD[order](self, self.start(x))
            return x, self.down(x)

    net = SSD(Odd(), ssd_extras(4, 300), VOC_300.boxes_per_cell, 3)
    with pytest.raises(ValueError, match=r"batch norm base\.norm does not follow a convolution of"):
        deploy(net)


def test_a_deployed_network_cannot_be_trained():
    with pytest.raises(ValueError, match="cannot be trained"):
        deploy(build_net("SSD_HarDNet39ds", 300, 4)).train()
