"""Deployed networks compute what the trained ones do."""

from __future__ import annotations

import copy
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

import pytest
import torch
from test_models import FORWARDS, assert_published_outputs, golden_weight, published_net
from torch import nn

from data.config import VOC_300
from inference.deploy import BLOCKS, deploy
from models import BACKBONES, build_net
from models.hardnet import HarDBlock, HarDNetBase, HarDNetSpec
from models.ssd import SSD, ssd_extras
from tools.traffic import profile

ROUTES = [name for name in BLOCKS if name != "gather"]  # which needs a GPU or Triton's interpreter
HARDNETS = [name for name in BACKBONES if "HarDNet" in name]


def trained(version: str) -> nn.Module:
    """In double precision, with weights of which none would hide a mistake by being 0 or 1."""
    net = build_net(version, 300, 4).eval()
    net.load_state_dict({k: golden_weight(k, tuple(t.shape)) for k, t in net.state_dict().items()})
    return net.double()


def pictures() -> torch.Tensor:
    return torch.rand(1, 3, 300, 300, generator=torch.manual_seed(1), dtype=torch.double) * 99


@torch.inference_mode()
def outputs(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return net(pictures().to(next(net.parameters()).dtype))


@lru_cache(maxsize=1)
def trained_with_outputs(version: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    net = trained(version)
    return net, outputs(net)


def error(net: nn.Module, exact: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Of ``net``, whatever its precision, relative to the largest exact output."""
    pairs = zip(outputs(net), exact, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("version", BACKBONES)
def test_deployed_network_equals_the_trained_one(version):
    net = trained(version)
    before = copy.deepcopy(net.state_dict())
    deployed, exact = deploy(net), outputs(net)
    assert error(deployed, exact) < 1e-11
    assert not {nn.BatchNorm2d, HarDBlock} & {type(m) for m in deployed.modules()}
    assert deployed.num_classes == 4 and not any(p.requires_grad for p in deployed.parameters())
    # The network itself is as it was.
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    # In single precision it is no farther from the exact outputs, which for some is far.
    single = copy.deepcopy(net).float()
    assert error(deploy(single), exact) < max(1e-5, 2 * error(single, exact))


@pytest.mark.parametrize("pad", [1, 8])
@pytest.mark.parametrize("blocks", ROUTES)
@pytest.mark.parametrize("version", ["SSD_HarDNet68", "SSD_HarDNet39ds"])
def test_every_route_through_a_block_gives_the_same(version, blocks, pad):
    net, exact = trained_with_outputs(version)
    deployed = deploy(net, blocks, pad)
    assert error(deployed, exact) < 1e-11
    if blocks == "slices":
        assert error(deployed, exact) < 1e-11  # again: no state is left behind
    widths = [block.widths for block in deployed.modules() if hasattr(block, "widths")]
    assert len(widths) == sum(isinstance(m, HarDBlock) for m in net.modules())
    assert all(width % pad == 0 for block in widths for width in block[1:-1])


def _interpret() -> None:
    """Before triton's import, in a process of its own."""
    os.environ["TRITON_INTERPRET"] = "1"


def gathered_error() -> float:
    """Of a detector of three small HarD blocks, in Triton's interpreter."""
    spec = HarDNetSpec(
        stem=(4, 6), growth=(4, 6, 4), layers=(2, 2, 4), channels=(8, 10, 12), multiplier=1.7,
        pool_after={0: False, 1: False}, stride8_block=1, dilated_bridge=False,
        depthwise=True, activation=nn.ReLU6,
    )  # fmt: skip
    net = SSD(HarDNetBase(spec), ssd_extras(12, 300), VOC_300.boxes_per_cell, 3).eval()
    net.load_state_dict({k: golden_weight(k, tuple(t.shape)) for k, t in net.state_dict().items()})
    return error(deploy(net, "gather"), outputs(copy.deepcopy(net).double()))


def test_blocks_that_gather_their_inputs_give_the_same():
    """tests/test_gathered_conv.py has every layer of the real networks."""
    pytest.importorskip("triton")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _interpret) as pool:
        assert pool.submit(gathered_error).result() < 1e-5


def test_gathering_needs_a_gpu():
    net = deploy(build_net("SSD_HarDNet39ds", 300, 4), "gather")
    with pytest.raises(ValueError, match="needs a CUDA GPU, the tensors are on cpu"):
        net(torch.zeros(1, 3, 300, 300))


@pytest.mark.parametrize("path", FORWARDS, ids=lambda p: p.stem)
def test_deployed_network_gives_the_published_outputs(path):
    assert_published_outputs(deploy(published_net(path)), path)


def test_what_each_route_moves():
    """Of SSD512-HarDNet68, in elements; docs/traffic.md has the figures of the plain network."""
    net = build_net("SSD_HarDNet68", 512, 81)
    plain, moved = profile(net, 512), {b: profile(deploy(net, b), 512) for b in ROUTES}
    assert all(p.macs == plain.macs for p in moved.values())
    # Six or seven source maps are read by one head each instead of two.
    sources = [64 * 64 * 320, 32 * 32 * 640, 16 * 16 * 512, *(256 * n * n for n in (8, 4, 2, 1))]
    assert moved["concatenate"].cio == moved["slices"].cio == plain.cio - sum(sources)
    rows = 2 * 32756 * (4 + 81)  # the heads' outputs, read and written
    assert moved["concatenate"].concat == plain.concat == 58_820_616
    # The activation's own result is written where it is read, if no layer takes it alone.
    assert rows < moved["slices"].concat < plain.concat
    assert moved["split"].concat == rows and moved["split"].sums > 0
    gathered = profile(deploy(net, "gather"), 512)
    assert (gathered.concat, gathered.sums) == (rows, 0)
    assert (gathered.cio, gathered.macs) == (moved["concatenate"].cio, plain.macs)


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
        found = half(pictures().float())
        for output, whole in zip(found, net(pictures().float()), strict=True):
            assert output.dtype == torch.bfloat16
            assert (output - whole).norm() < 0.05 * whole.norm()


ODD = {
    "norm first": lambda m, x: m.conv(torch.relu(m.norm(x.relu()))),
    "activation between": lambda m, x: m.norm(torch.relu_(m.conv(x))),
    "another reader": lambda m, x: (y := m.conv(x)) + m.norm(y),
    "convolution twice": lambda m, x: m.norm(m.conv(torch.relu(m.conv(x)))),
    "norm twice": lambda m, x: m.norm(m.conv(m.norm(m.other(x)))),
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


def test_bad_arguments():
    net = build_net("SSD_HarDNet39ds", 300, 4)
    with pytest.raises(ValueError, match="blocks is 'x', should be one of concatenate, slices"):
        deploy(net, "x")
    with pytest.raises(ValueError, match="pad is 0"):
        deploy(net, pad=0)
    with pytest.raises(ValueError, match="cannot be trained"):
        deploy(net).train()
