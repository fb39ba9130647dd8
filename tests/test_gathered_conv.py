"""Convolutions over several tensors equal those over their concatenation: in Triton's interpreter
on the CPU, and on a GPU. The compiler's code for GPUs is checked without one."""

import math
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pytest
import torch
from tiny import SmallHarDNet
from torch import Tensor, nn
from torch.nn import functional as F

from data.config import VOC_300
from inference import gathered_conv
from inference.deploy import deploy
from inference.gathered_conv import DTYPES, GatheredBlock, GatheredWeight, gathered_conv2d
from models import BACKBONES, build_net
from models.ssd import SSD, ssd_extras
from tools.traffic import profile

DIGITS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Rounding errors, relative."""


def layers_of(version: str) -> dict[tuple, int]:
    """Every (widths, outputs, kernel, activation) -> the largest side of its maps at 512."""
    found: dict[tuple, int] = {}

    def note(block, inputs):
        for conv in block.convs:
            key = (conv.widths, len(conv.bias), conv.kernel, conv.activation)
            found[key] = max(found.get(key, 0), inputs[0].shape[-1])

    with torch.device("meta"):
        net = deploy(build_net(version, 512, 2), gather=True)
        for module in net.modules():
            if isinstance(module, GatheredBlock):
                module.register_forward_pre_hook(note)
        net(torch.empty(1, 3, 512, 512))
    return found


VERSIONS = [name for name in BACKBONES if name.startswith("SSD_HarDNet")]


def made_up(widths, outputs, kernel, dtype, size=(2, 5, 7),
            device="cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    """Parts, weight and bias of about 1, with outputs of about 2: some of them over 6."""
    generator = torch.Generator().manual_seed(sum(widths) + outputs)
    batch, *sides = size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    parts = [random(batch, width, *sides).to(memory_format=torch.channels_last) for width in widths]
    weight = random(outputs, sum(widths), kernel, kernel)
    return parts, weight * (2 / math.sqrt(weight[0].numel())), random(outputs)


def reference(parts, weight, bias, activation) -> Tensor:
    """In float64, of the inputs as they are."""
    x = torch.cat(parts, 1).double()
    y = F.conv2d(x, weight.double(), bias.double(), padding=weight.shape[-1] // 2)
    return {"linear": lambda y: y, "relu": F.relu, "relu6": F.relu6}[activation](y)


def check(result: Tensor, parts, weight, bias, activation) -> None:
    """To a rounding of the result, and of its sum in float32.

    A float32 sum of K products is off by at most K u S in any order: u is 2^-24 and S the sum of
    the magnitudes. As most rounding errors cancel, sqrt(K) u S holds nearly always (Higham and
    Mary 2019). Measured: a sixth of that.
    """
    expected = reference(parts, weight, bias, activation)
    magnitudes = reference([x.abs() for x in parts], weight.abs(), bias.abs(), "linear")
    # The interpreter cuts bfloat16 off where it should round.
    allowed = 2 * DIGITS[result.dtype] * expected.abs()
    allowed += math.sqrt(weight[0].numel()) * 2**-24 * magnitudes
    worst = ((result.double() - expected).abs() / allowed).max().item()
    assert worst <= 1, f"{worst:.3g} times the error that rounding explains"


def test_the_tolerance_admits_rounding_and_no_missing_product():
    """One product after the other, which rounds worst, at the size of the maps on a GPU."""
    parts, weight, bias = made_up((14, 24, 64), 40, 3, torch.float32, (2, 63, 63))
    x, total = F.pad(torch.cat(parts, 1), (1, 1, 1, 1)), torch.zeros(2, 40, 63, 63)
    for channel, i, j in product(range(x.shape[1]), range(3), range(3)):
        before = total.clone() if (channel, i, j) == (101, 2, 2) else None
        shifted = x[:, channel, None, i : i + 63, j : j + 63]
        total += shifted * weight[:, channel, i, j, None, None]
    check(total + bias[:, None, None], parts, weight, bias, "linear")
    with pytest.raises(AssertionError, match="times the error"):
        check(before + bias[:, None, None], parts, weight, bias, "linear")


def _interpret() -> None:
    """Before triton's import, in a process of its own."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def triton():
    return pytest.importorskip("triton", minversion="3.4")


@pytest.fixture(scope="module")
def interpreted(triton):
    """interpreted(function, *arguments) -> its result, of a process with Triton's interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _interpret) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(timeout=600)


def compare(widths, outputs, kernel, activation, dtype=torch.float32, size=(2, 5, 7),
            device="cpu") -> None:
    parts, weight, bias = made_up(widths, outputs, kernel, dtype, size, device)
    result = gathered_conv2d(parts, GatheredWeight(weight, bias, widths, activation))
    assert result.is_contiguous(memory_format=torch.channels_last)
    check(result, parts, weight, bias, activation)


def compare_layers(version: str, step: int) -> int:
    layers = list(layers_of(version))
    for layer in layers[::step]:
        compare(*layer, size=(2, 3, 4))
    return len(layers)


@pytest.mark.parametrize(
    ("version", "count", "step"),
    [("39ds", 25, 6), *(pytest.param(name, count, 1, marks=pytest.mark.slow)
                        for name, count in (("39ds", 25), ("68", 44), ("85", 53), ("68ds", 44)))])
def test_layers_equal_convolutions_of_the_concatenation(interpreted, version, count, step):
    assert interpreted(compare_layers, f"SSD_HarDNet{version}", step) == count


@pytest.mark.parametrize("layer", [
    ((14, 24, 64), 40, 1, "linear", torch.float32), ((14, 24, 64), 40, 3, "relu", torch.bfloat16),
    ((14, 24, 64), 40, 3, "relu6", torch.float16), ((6, 3), 5, 3, "relu", torch.float32, (1, 1, 1)),
    ((6, 3), 5, 3, "relu", torch.float32, (3, 1, 9)),
    ((6, 3), 5, 3, "relu", torch.float32, (2, 9, 1)),
    ((6, 3), 5, 3, "relu", torch.float32, (2, 13, 11)),  # three programs, the last in part
    ((70,), 3, 3, "relu"), (tuple(range(1, 10)), 3, 3, "relu"),
    ((20, 7), 300, 1, "relu"),  # outputs of several programs
])
def test_types_kernels_activations_and_any_sizes(interpreted, layer):
    interpreted(compare, *layer)


def use_slices() -> None:
    """Parts and result are channels of one tensor, whose others are NaN and stay so."""
    widths, outputs, (batch, height, width) = (14, 24, 5), 10, (2, 4, 6)
    parts, weight, bias = made_up(widths, outputs, 3, torch.bfloat16, (batch, height, width))
    whole = torch.full((batch, 70, height, width), torch.nan, dtype=torch.bfloat16)
    whole = whole.to(memory_format=torch.channels_last)
    first = (3, 17, 60)
    for part, width, at in zip(parts, widths, first, strict=True):
        whole[:, at : at + width] = part
    before = whole.clone()
    out = whole[:, 45:55]
    slices = [whole[:, at : at + width] for width, at in zip(widths, first, strict=True)]
    assert gathered_conv2d(slices, GatheredWeight(weight, bias, widths, "relu"), out) is out
    check(out, parts, weight, bias, "relu")
    before[:, 45:55] = out
    torch.testing.assert_close(whole, before, rtol=0, atol=0, equal_nan=True)


def propagate_nan() -> None:
    """To its neighbours only."""
    parts, weight, bias = made_up((3, 4), 2, 3, torch.float32)
    parts[1][0, 2, 0, 0] = torch.nan
    result = gathered_conv2d(parts, GatheredWeight(weight, bias, (3, 4), "relu6"))
    expected = reference(parts, weight, bias, "relu6")
    assert torch.equal(result.isnan(), expected.isnan()) and result.isnan().sum() == 8


def use_blocks() -> None:
    """A deployed detector of gathered HarD blocks equals the plain one."""
    torch.manual_seed(0)
    base = SmallHarDNet()
    net = SSD(base, ssd_extras(base.out_channels[1], 300), VOC_300.boxes_per_cell, 3).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    images = torch.rand(1, 3, 300, 300, generator=torch.manual_seed(1)) * 99
    with torch.inference_mode():
        pairs = zip(deploy(net, gather=True)(images), net.double()(images.double()), strict=True)
        assert all((a - b).abs().max() < 1e-5 * b.abs().max() for a, b in pairs)


@pytest.mark.parametrize("check", [use_slices, propagate_nan, use_blocks])
def test_slices_nan_and_deployed_blocks(interpreted, check):
    interpreted(check)


def test_a_deployed_network_of_gathered_blocks_copies_nothing():
    net = build_net("SSD_HarDNet39ds", 300, 21)
    deployed, gathered = (profile(deploy(net, gather), 300) for gather in (False, True))
    assert (gathered.cio, gathered.macs) == (deployed.cio, deployed.macs)
    assert gathered.concat == 2 * 11620 * (4 + 21)  # the heads' outputs, read and written


def call(change=list, out=None) -> Tensor:
    parts, weight, bias = made_up((2, 3), 4, 3, torch.float32)
    return gathered_conv2d(change(parts), GatheredWeight(weight, bias, (2, 3), "relu"), out)


@pytest.mark.parametrize(("change", "out", "sentence"), [
    (lambda p: p[:1], None, "1 parts, the weights are for 2"),
    (lambda p: [p[0][0], p[1]], None, "part 0 has 3 dimensions, should have 4"),
    (lambda p: p[::-1], None, r"part 0 is \[2, 3, 5, 7\], should be \[2, 2, 5, 7\]"),
    (lambda p: [p[0], p[1][:, :, :4]], None, r"part 1 is \[2, 3, 4, 7\], should be \[2, 3, 5"),
    (lambda p: [p[0], p[1].contiguous()], None, r"part 1 .* strides \[105, 35, 7, 1\], should"),
    (lambda p: [x.requires_grad_() for x in p], None, "no gradient; call it under torch.no_g"),
    (list, (2, 5, 5, 7), r"out is \[2, 5, 5, 7\], should be \[2, 4, 5, 7\]"),
    (list, (2, 4, 5, 7), r"out of shape \[2, 4, 5, 7\] has strides \[140, 35, 7, 1\]")])
def test_wrong_tensors_are_refused(change, out, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(change, out and torch.empty(out))


def test_wrong_weights_are_refused():
    right = {"weight": torch.ones(4, 5, 3, 3), "bias": torch.ones(4), "widths": [2, 3]}
    for change, sentence in (
        ({"weight": torch.ones(4, 5, 5, 5)}, "the kernel is 5x5, should be 1x1 or 3x3"),
        ({"widths": [2, 2]}, r"the widths \[2, 2\] do not add up to 5 input channels"),
        ({"activation": "gelu"}, "the activation is 'gelu', should be linear, relu or relu6"),
        ({"weight": torch.ones(4, 5, 1, 1).double()}, "the weights are torch.float64, not"),
    ):
        with pytest.raises(ValueError, match=sentence):
            GatheredWeight(**{**right, "activation": "relu", **change})


def test_nothing_is_computed_without_pixels():
    assert call(lambda parts: [part[:0] for part in parts]).shape == (0, 4, 5, 7)


def test_what_it_needs_is_said(triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA GPU, the tensors are on cpu"):
        call()
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(RuntimeError, match=r"needs Triton 3.4 or later \(PyTorch 2.8\), this is"):
        gathered_conv._kernel.__wrapped__("cuda")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton, which cannot be imported .*pip install"):
        gathered_conv._kernel.__wrapped__("cuda")


def compiled(weight: GatheredWeight, capability: int, tile: tuple[int, int], row: int):
    """What Triton makes of a layer whose parts lie in a tensor ``row`` channels wide, at any
    place; no GPU is needed."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = gathered_conv._kernel.__wrapped__("cuda").fn
    dtype = weight.weight.dtype
    size, outputs = dtype.itemsize, len(weight.bias)
    widths, kernel = weight.widths, weight.kernel
    constants = {
        "WIDTHS": widths, "ROWS": (row,) * len(widths),
        "VECTORS": tuple(math.gcd(16 // size, width, row) for width in widths),
        "CHUNKS": tuple(gathered_conv._chunk(kernel**2 * width, size) for width in widths),
        "OUTPUTS": outputs, "OUT_ROW": row, "OUT_VECTOR": math.gcd(16 // size, outputs, row),
        "COLUMNS": weight.weight.shape[1], "KERNEL": kernel, "ACTIVATION": weight.activation,
        "PRECISION": "ieee", "WIDEN": False, "BLOCK_M": tile[0], "BLOCK_N": tile[1],
    }
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = dict.fromkeys(("weight", "bias", "out"), pointer)
    types |= {"parts": (pointer,) * len(weight.widths)}
    types |= dict.fromkeys(("height", "width", "pixels"), "i32")
    types |= dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("weight", "bias")}
    source = ASTSource(function, {name: types[name] for name in names},
                       {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, 80), (torch.bfloat16, 90)])
def test_compiles_for_a_gpu_with_matrix_units_and_wide_loads(triton, dtype, capability, tmp_path,
                                                             monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weight = GatheredWeight(torch.randn(40, 102, 3, 3), torch.randn(40), (14, 24, 64), "relu")
    asm = compiled(weight.to(dtype), capability, (64, 32), row=102 + 2)
    assert asm["cubin"].startswith(b"\x7fELF")
    if dtype != torch.float32:
        unit = r"wgmma\.mma_async\S+m64n32k16" if capability == 90 else r"mma\.sync\S+m16n8k16"
        assert re.search(unit, asm["ptx"])
    # Loads and stores of single channels would be 2 bytes; 14 channels allow 4, 24 and 64 allow 16.
    assert not re.search(r"(ld|st)\.global\S*\.b16", asm["ptx"])
    widths = re.findall(r"cp\.async\.c[ag]\.\S+ \[.*?\], \[.*?\], (\w+)", asm["ptx"])
    assert set(widths) == ({"0x8", "0x10"} if dtype == torch.float32 else {"0x4", "0x10"})


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("triton")(test))


def compare_on_gpu(*layer, side, dtype=torch.bfloat16) -> None:
    compare(*layer, dtype, (2, side, side), "cuda")


@on_gpu
@pytest.mark.parametrize("version", VERSIONS)
def test_gpu_every_layer_at_the_size_of_its_maps(version, one_tile):
    for layer, side in layers_of(version).items():
        compare_on_gpu(*layer, side=side)


@on_gpu
@pytest.mark.parametrize("one_tile", gathered_conv.TILES, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_every_tile_and_type(one_tile, dtype):
    compare_on_gpu((14, 24, 64), 40, 3, "relu", side=63, dtype=dtype)
    compare_on_gpu((16, 16, 16, 134), 256, 1, "relu6", side=33, dtype=dtype)


@on_gpu
def test_gpu_slices_the_fastest_tile_and_a_captured_graph():
    widths, outputs = (14, 24, 64), 40
    parts, weight, bias = made_up(widths, outputs, 3, torch.float16, (2, 37, 41), "cuda")
    whole = torch.cat([torch.full_like(parts[0][:, :1], torch.nan), *parts], 1)
    whole = whole.to(memory_format=torch.channels_last)
    slices = whole[:, 1:].split(widths, 1)
    packed = GatheredWeight(weight, bias, widths, "relu")
    out = torch.empty_like(whole)[:, 3 : 3 + outputs]
    check(gathered_conv2d(slices, packed, out), parts, weight, bias, "relu")
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gathered_conv2d(slices, packed, out)
    graph.replay()
    check(out, parts, weight, bias, "relu")


@on_gpu
def test_gpu_tf32_is_a_choice(tf32):
    parts, weight, bias = made_up((14, 24), 20, 3, torch.float32, (1, 9, 9), "cuda")
    packed = GatheredWeight(weight, bias, (14, 24), "linear")
    exact = reference(parts, weight, bias, "linear")
    errors = []
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        errors.append((gathered_conv2d(parts, packed) - exact).abs().max().item())
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < 0.05
