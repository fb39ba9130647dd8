"""The rows beside the three of the publication's own code: structure, names, counts, and a run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data.config import COCO_512, MOBILE_300, VOC_300
from layers import MultiBoxLoss, PriorBox
from models import BACKBONES, build_net, prior_config
from models.hardnet import (
    HARDNET_SPECS,
    ConvLayer,
    DepthwiseBridge,
    DWConvLayer,
    HarDBlock,
    HarDNetBase,
)
from models.identify import identify
from train_test import main
from utils.errors import UserError

STATE_DICTS = Path(__file__).parent / "goldens" / "state_dicts"
ROWS = [
    "SSD_resnet101", "SSD_mobile", "SSD_HarDNet68ds", "SSD_HarDNet39ds", "RFB_HarDNet68",
    "RFB_HarDNet85",
]  # fmt: skip


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def torchvision_net(name: str, **options) -> torch.nn.Module:
    return getattr(pytest.importorskip("torchvision.models"), name)(weights=None, **options)


def randomise(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Statistics and scales as after training, so that evaluation mode shows every layer."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in net.state_dict().items():
        if key.endswith(("running_mean", "running_var")) or tensor.dim() == 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_((0.2 * noise).exp() if key.endswith(("var", "weight")) else 0.1 * noise)
        elif tensor.dim() == 4:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
    return net.eval()


# ---------------------------------------------------------------- priors and sizes


def test_mobile_priors_are_the_published_ones():
    assert MOBILE_300.num_priors == 6 * (361 + 100 + 25 + 9) + 4 * (4 + 1)
    boxes = PriorBox(MOBILE_300)()
    # First cell: centre 8 of 300; 45, sqrt(45 x 90), and 45 x sqrt(2) by 45 / sqrt(2).
    centre, side = 8 / 300, (45 * 90) ** 0.5 / 300
    torch.testing.assert_close(
        boxes[:3],
        torch.tensor(
            [
                [centre, centre, 0.15, 0.15],
                [centre, centre, side, side],
                [centre, centre, 0.15 * 2**0.5, 0.15 / 2**0.5],
            ]
        ),
    )
    # The last map is one cell in the middle: 270 and sqrt(270 x 315).
    torch.testing.assert_close(boxes[-4], torch.tensor([0.5, 0.5, 0.9, 0.9]))
    torch.testing.assert_close(boxes[-3, 2], torch.tensor((270 * 315) ** 0.5 / 300))


def test_priors_are_chosen_by_version_data_set_and_size():
    assert prior_config("SSD_mobile", "VOC", 300) is MOBILE_300
    assert prior_config("SSD_mobile", "COCO", 300) is MOBILE_300
    assert prior_config("RFB_HarDNet85", "VOC", 300) is VOC_300
    assert prior_config("SSD_resnet101", "COCO", 512) is COCO_512


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("SSD_mobile", "VOC", 512), "SSD_mobile does not exist at size 512, choose from 300"),
        (("SSD_resnet", "VOC", 300), "unknown version 'SSD_resnet'.*SSD_resnet101"),
        (("SSD_vgg", "LVIS", 300), "'LVIS', choose from VOC, COCO"),
    ],
)
def test_priors_that_do_not_exist_are_refused_with_the_choices(arguments, words):
    with pytest.raises(ValueError, match=words):
        prior_config(*arguments)


def test_command_line_refuses_a_size_that_a_network_does_not_have(voc_folder, tmp_path, capsys):
    options = ["-d", "VOC", "-v", "SSD_mobile", "--root", str(voc_folder)]
    assert main([*options, "--save_folder", str(tmp_path / "w")]) == 2
    assert "SSD_mobile does not exist at size 512, choose from 300" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


# ---------------------------------------------------------------- receptive-field blocks


@pytest.mark.parametrize(
    ("version", "size", "like"),
    [
        ("RFB_HarDNet68", 300, "RFB_HarDNet85_300_21"),
        ("RFB_HarDNet85", 512, "RFB_HarDNet68_512_81"),
    ],
)
def test_sizes_without_a_published_listing_differ_from_the_other_depth_in_the_base_alone(
    version, size, like
):
    """Beside the base, 640 or 720 channels enter extras.0, whose t is an eighth of them."""
    golden = json.loads((STATE_DICTS / f"{like}.json").read_text())
    with torch.device("meta"):
        state = build_net(version, size, int(like.rpartition("_")[2])).state_dict()
    ours = [[k, list(t.shape)] for k, t in state.items() if not k.startswith("base.")]
    theirs = [[k, shape] for k, shape in golden if not k.startswith("base.")]
    there, here = (640, 720) if "85" in version else (720, 640)
    scale = {there: here, **{there // 8 * n: here // 8 * n for n in (1, 2, 4)}}
    scale[there // 16 * 3] = here // 16 * 3
    for key, shape in theirs:
        if key.startswith("extras.0."):
            shape[:] = [side if side == 1024 else scale.get(side, side) for side in shape]
    assert ours == theirs


# Branch -> (stride, padding, dilation) layer by layer, as written down for the RFB networks.
_S = (1, 0, 1)  # a 1x1 convolution
_NORM = {
    "branch0": [_S, (1, 1, 1)],
    "branch1": [_S, (1, (1, 0), 1), (1, 3, 3)],
    "branch2": [_S, (1, (0, 1), 1), (1, 3, 3)],
    "branch3": [_S, (1, (0, 1), 1), (1, (1, 0), 1), (1, 5, 5)],
}


def _extra(stride: int, visual: int) -> dict[str, list]:
    return {
        "branch0": [_S, (stride, 1, 1), (1, visual + 1, visual + 1)],
        "branch1": [_S, (1, 1, 1), (stride, 1, 1), (1, 2 * visual + 1, 2 * visual + 1)],
    }


def field(state, prefix: str, branches: dict[str, list], x: torch.Tensor, stride: int = 1):
    """A receptive-field block written out with the tensors of a state dict."""

    def conv(name, x, stride, padding, dilation, relu):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding, dilation)
        mean, var, weight, bias = (
            state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * weight[:, None, None] + bias[:, None, None]
        return x.relu() if relu else x

    outputs = []
    for branch, layers in branches.items():
        y = x
        for i, options in enumerate(layers):
            y = conv(f"{prefix}.{branch}.{i}", y, *options, relu=i < len(layers) - 1)
        outputs.append(y)
    mixed = conv(f"{prefix}.ConvLinear", torch.cat(outputs, 1), 1, 0, 1, relu=False)
    return (mixed + conv(f"{prefix}.shortcut", x, stride, 0, 1, relu=False)).relu()


def test_receptive_fields_equal_their_definition_written_out():
    net = randomise(build_net("RFB_HarDNet68", 512, 3))
    state = net.state_dict()
    with torch.no_grad():
        x = torch.randn(2, 320, 12, 11)
        torch.testing.assert_close(
            net.Norm(x), field(state, "Norm", _NORM, x), rtol=1e-4, atol=1e-4
        )
        x = torch.randn(2, 640, 9, 8)
        for i, (stride, visual) in enumerate([(1, 2), (2, 2), (2, 2), (2, 1), (2, 1)]):
            expected = field(state, f"extras.{i}", _extra(stride, visual), x, stride)
            x = net.extras[i](x)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "channels", "sides"),
    [
        (300, [512, 1024, 512, 256, 256, 256], [38, 19, 10, 5, 3, 1]),
        (512, [512, 1024, 512, 256, 256, 256, 256], [64, 32, 16, 8, 4, 2, 1]),
    ],
)
def test_sources_of_the_rfb_networks(size, channels, sides):
    with torch.device("meta"):
        maps = build_net("RFB_HarDNet85", size, 3).eval().sources(torch.empty(1, 3, size, size))
    assert [m.shape[1] for m in maps] == channels
    assert [m.shape[-1] for m in maps] == sides


def test_new_layers_of_the_rfb_networks_start_from_kaiming_fan_out_and_zero_bias():
    net = build_net("RFB_HarDNet68", 300, 3)
    for conv in (net.extras[0].branch0[1].conv, net.Norm.ConvLinear.conv, net.extras[4].conv):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert net.Norm.branch0[0].bn.momentum == 0.01
    assert not any(head.bias.any() for head in (*net.loc, *net.conf))


# ---------------------------------------------------------------- torchvision's classifiers


def test_resnet_maps_are_those_of_torchvisions_network():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    dilated = torchvision_net("resnet101", replace_stride_with_dilation=(False, False, True))
    reference = randomise(dilated)
    base = build_net("SSD_resnet101", 300, 3).base.eval()
    base.load_state_dict(
        {k: t for k, t in reference.state_dict().items() if not k.startswith("fc.")}
    )
    x = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        maps = base(x)
        expected = feature_extraction.create_feature_extractor(reference, ["layer2", "layer4"])(x)
    assert [m.shape[1:] for m in maps] == [(512, 10, 10), (2048, 5, 5)]
    for ours, theirs in zip(maps, expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mobilenet_maps_are_those_of_torchvisions_network():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    reference = randomise(torchvision_net("mobilenet_v2"))
    base = build_net("SSD_mobile", 300, 3).base.eval()
    base.load_state_dict(reference.features.state_dict())
    x = torch.randn(1, 3, 96, 96)
    nodes = ["features.14.conv.0", "features.18"]
    with torch.no_grad():
        maps = base(x)
        expected = feature_extraction.create_feature_extractor(reference, nodes)(x)
    assert [m.shape[1:] for m in maps] == [(576, 6, 6), (1280, 3, 3)]
    for ours, theirs in zip(maps, expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("version", "name"), [("SSD_resnet101", "resnet101"), ("SSD_mobile", "mobilenet_v2")]
)
def test_torchvisions_weights_fill_the_whole_base_and_their_head_is_left(version, name):
    with torch.device("meta"):
        classifier = torchvision_net(name).state_dict()
        base = BACKBONES[version].base().state_dict()
    keys = {key: BACKBONES[version].from_classifier(key) for key in classifier}
    mapped = {base_key: classifier[key].shape for key, base_key in keys.items() if base_key}
    assert mapped == {key: tensor.shape for key, tensor in base.items()}
    left = {key.split(".")[0] for key, base_key in keys.items() if base_key is None}
    assert left == ({"fc"} if name == "resnet101" else {"classifier"})


def test_torchvision_that_cannot_be_imported_is_named(monkeypatch):
    state = build_net("SSD_mobile", 300, 3).state_dict()
    foreign = {**state, "more": torch.zeros(1)}
    hard = build_net("RFB_HarDNet85", 300, 3).state_dict()
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    words = r"ResNet101.*torchvision.*cannot be imported beside torch.*pip install torch==\d\S+ tor"
    with pytest.raises(UserError, match=words):
        build_net("SSD_resnet101", 300, 21)
    # The others are still found, and an answer that may be incomplete says so.
    assert identify(hard) == ("RFB_HarDNet85", 300, 3)
    with pytest.raises(ValueError, match="SSD_resnet101 was not compared.*SSD_mobile was not"):
        identify(foreign)


# ---------------------------------------------------------------- HarDNet's classifiers


@pytest.mark.parametrize(
    ("version", "last", "ours_alone"),
    [
        ("SSD_HarDNet68", 12, {"13"}),
        ("SSD_HarDNet85", 14, set()),
        ("SSD_HarDNet68ds", 12, set()),
        ("SSD_HarDNet39ds", 10, set()),
        ("RFB_HarDNet68", 12, {"13"}),
        ("RFB_HarDNet85", 14, set()),
    ],
)
def test_hardnet_classifiers_stages_fill_the_base_up_to_its_bridge(version, last, ours_alone):
    row = BACKBONES[version]
    with torch.device("meta"):
        base = row.base().state_dict()
    filled = {row.from_classifier(f"base.{key}") for key in base} - {None}
    assert {key.split(".")[0] for key in base if key not in filled} == ours_alone
    assert row.from_classifier(f"base.{last}.conv.weight") == f"{last}.conv.weight"
    for stranger in (f"base.{last + 1}.conv.weight", "base.16.3.weight", "fc.weight", "base.1"):
        assert row.from_classifier(stranger) is None


def test_a_row_without_a_classifier_has_no_place_for_its_keys():
    assert BACKBONES["SSD_vgg"].from_classifier("features.0.weight") is None


def widths(growth: int, multiplier: float, layers: int, channels: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's layers, from the definition alone."""
    outs, pairs = {0: channels}, []
    for layer in range(1, layers + 1):
        links = [layer - 2**i for i in range(10) if layer % 2**i == 0 and layer >= 2**i]
        width = growth * multiplier ** (len(links) - 1)
        outs[layer] = int(int(width + 1) / 2) * 2
        pairs.append((sum(outs[link] for link in links), outs[layer]))
    return pairs


def depthwise_count(spec: dict, blocks: int) -> int:
    """Parameters of a HarDNet-DS up to and with ``blocks`` blocks, by hand."""
    first, second = spec["stem"]
    total = 27 * first + 2 * first + first * second + 2 * second + 11 * second
    channels = second
    for growth, layers, out, halves in spec["blocks"][:blocks]:
        pairs = widths(growth, spec["multiplier"], layers, channels)
        # 1x1 convolution, 3x3 depth-wise convolution, and two numbers a channel behind each.
        total += sum(i * o + 2 * o + 9 * o + 2 * o for i, o in pairs)
        kept = sum(o for n, (_, o) in enumerate(pairs, 1) if n % 2 or n == layers)
        total += kept * out + 2 * out + (11 * out if halves else 0)
        channels = out
    return total


# The classifiers as published, the last block with them: growth, layers, outputs, halved or not.
DEPTHWISE = {
    "68ds": {
        "stem": (32, 64),
        "multiplier": 1.7,
        "blocks": [
            (14, 8, 128, True), (16, 16, 256, False), (20, 16, 320, True), (40, 16, 640, True),
            (160, 4, 1024, False),
        ],
        "published": 4.2e6,
        "base": 1_473_260,
    },
    "39ds": {
        "stem": (24, 48),
        "multiplier": 1.6,
        "blocks": [(16, 4, 96, True), (20, 16, 320, True), (64, 8, 640, True),
                   (160, 4, 1024, False)],
        "published": 3.5e6,
        "base": 912_682,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_members_have_the_parameters_of_the_published_classifiers(name):
    """The formula, with the last block and 1000 classes, gives the published millions; the base,
    which leaves out the last block and the halving before it, has what the formula says."""
    spec = DEPTHWISE[name]
    blocks = spec["blocks"]
    classifier = depthwise_count(spec, len(blocks)) + 1024 * 1000 + 1000
    assert round(classifier / 1e5) == round(spec["published"] / 1e5)
    base = HarDNetBase(HARDNET_SPECS[name])
    assert count(base) == depthwise_count(spec, len(blocks) - 1) - 11 * 640 == spec["base"]


@pytest.mark.parametrize(
    ("name", "growth", "channels", "millions", "gmacs"),
    [
        (68, 160, 1024, 17.6, 4.3),
        (85, 256, 1280, 36.7, 9.1),
        ("68ds", 160, 1024, 4.2, 0.8),
        ("39ds", 160, 1024, 3.5, 0.44),
    ],
)
def test_with_their_last_block_the_bases_have_the_published_size_and_work(
    name, growth, channels, millions, gmacs
):
    """The classifiers: one more halving, block of 4 layers and 1000 classes, at 224 pixels."""
    spec = HARDNET_SPECS[name]
    whole = replace(
        spec,
        growth=(*spec.growth, growth),
        layers=(*spec.layers, 4),
        channels=(*spec.channels, channels),
        pool_after={**spec.pool_after, len(spec.layers) - 1: False},
        dilated_bridge=False,
    )
    with torch.device("meta"):
        classifier = HarDNetBase(whole).eval()
        with FlopCounterMode(display=False) as counter:
            _, last = classifier(torch.empty(1, 3, 224, 224))
    assert last.shape == (1, channels, 7, 7)
    assert round((count(classifier) + channels * 1000 + 1000) / 1e6, 1) == millions
    macs = counter.get_total_flops() / 2 + channels * 1000
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.035)


@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_members_have_pairs_in_the_blocks_and_strided_convolutions_for_pools(name):
    base = HarDNetBase(HARDNET_SPECS[name])
    assert not [m for m in base.modules() if isinstance(m, torch.nn.MaxPool2d)]
    assert not [m for m in base.modules() if type(m) is torch.nn.ReLU]
    strides = [m.dwconv.stride for m in base if isinstance(m, DWConvLayer)]
    assert strides == [(2, 2)] * 3
    for block in (m for m in base if isinstance(m, HarDBlock)):
        for layer in block.layers:
            assert list(dict(layer.named_children())) == ["layer1", "layer2"]
            assert isinstance(layer.layer1, ConvLayer)
            assert layer.layer1.conv.kernel_size == (1, 1)
            assert layer.layer2.dwconv.groups == layer.layer1.conv.out_channels
    with torch.no_grad():
        first, second = base(torch.randn(1, 3, 96, 96))
    assert (first.shape, second.shape) == ((1, 320, 12, 12), (1, 640, 6, 6))
    assert 0 <= float(first.min()) and float(first.max()) <= 6


# ---------------------------------------------------------------- the whole detectors


def ssd_count(version: str, size: int, num_classes: int, base: int, channels: tuple) -> int:
    """Parameters of an SSD, by hand: base, scale of source 1, extras and heads."""
    steps = [(256, 512, 3), *[(128, 256, 3)] * 3]
    if size == 512:
        steps += [(128, 256, 4)]
    total, width = base + channels[0], channels[1]
    for narrow, out, kernel in steps:
        total += width * narrow + narrow + narrow * out * kernel**2 + out
        width = out
    sources = [*channels, *(out for _, out, _ in steps)]
    boxes = [6] * (len(sources) - 2) + [4, 4]
    per_box = 4 + num_classes
    return total + sum(
        9 * c * a * per_box + a * per_box for c, a in zip(sources, boxes, strict=True)
    )


BRIDGE_DS = 2 * 640 * 640 + 9 * 640 + 3 * 2 * 640
# The classifier's parameters as torchvision states them, less its head's.
RESNET101 = 44_549_160 - (2048 * 1000 + 1000)
MOBILENET = 3_504_872 - (1280 * 1000 + 1000)


@pytest.mark.parametrize(
    ("version", "base", "channels", "pinned"),
    [
        ("SSD_vgg", 20_483_904, (512, 1024), {512: 36_821_726}),
        ("SSD_resnet101", RESNET101, (512, 2048), {300: 62_067_296, 512: 63_800_286}),
        ("SSD_mobile", MOBILENET, (576, 1280), {300: 18_363_104}),
        ("SSD_HarDNet68ds", 1_473_260 + BRIDGE_DS, (320, 640), {300: 14_164_556, 512: 15_897_546}),
        ("SSD_HarDNet39ds", 912_682 + BRIDGE_DS, (320, 640), {300: 13_603_978, 512: 15_336_968}),
    ],
)
def test_parameters_of_a_detector_are_those_counted_by_hand(version, base, channels, pinned):
    for size, total in pinned.items():
        with torch.device("meta"):
            net = build_net(version, size, 81)
        assert count(net) == ssd_count(version, size, 81, base, channels) == total
    if version.endswith("ds"):
        assert count(DepthwiseBridge(640)) == count(net.bridge) == BRIDGE_DS


@pytest.mark.parametrize(
    ("version", "size", "num_classes", "listing"),
    [
        ("RFB_HarDNet68", 512, 81, "RFB_HarDNet68_512_81"),
        ("RFB_HarDNet85", 300, 21, "RFB_HarDNet85_300_21"),
    ],
)
def test_parameters_of_the_rfb_networks_are_those_of_the_listings(
    version, size, num_classes, listing
):
    golden = json.loads((STATE_DICTS / f"{listing}.json").read_text())
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    listed = sum(int(np.prod(shape)) for key, shape in golden if not key.endswith(buffers))
    pinned = {"RFB_HarDNet68": 33_112_214, "RFB_HarDNet85": 29_113_556}[version]
    with torch.device("meta"):
        assert count(build_net(version, size, num_classes)) == listed == pinned


@pytest.mark.parametrize("num_classes", [21, 81])
@pytest.mark.parametrize(
    ("version", "size"),
    [(version, size) for version, row in BACKBONES.items() for size in row.sizes],
)
def test_every_row_is_found_by_its_tensors(version, size, num_classes):
    with torch.device("meta"):
        state = build_net(version, size, num_classes).state_dict()
    assert identify(state) == (version, size, num_classes)


@pytest.mark.parametrize("version", ROWS)
def test_one_step_reaches_every_weight_even_with_one_picture(version):
    torch.manual_seed(0)
    net = build_net(version, 300, 4).train()
    priors = PriorBox(prior_config(version, "VOC", 300))()
    targets = [torch.tensor([[0.1, 0.2, 0.5, 0.6, 1.0], [0.4, 0.4, 0.9, 0.8, 3.0]])]
    outputs = net(torch.randn(1, 3, 300, 300) * 50)
    loss = sum(MultiBoxLoss(4)(outputs, priors, targets))
    # The loss alone leaves out the heads of maps without a positive and without a mined negative.
    (loss + sum(output.square().mean() for output in outputs)).backward()
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), key
    torch.optim.SGD(net.parameters(), lr=1e-4).step()
    with torch.no_grad():
        after = sum(MultiBoxLoss(4)(net(torch.randn(1, 3, 300, 300) * 50), priors, targets))
    assert torch.isfinite(loss) and torch.isfinite(after)


@pytest.mark.parametrize("version", ROWS)
def test_every_row_trains_and_tests(version, voc_folder, tmp_path):
    machine = ["--save_folder", str(tmp_path / "w"), "--device", "cpu", "--num_workers", "0"]
    options = ["-d", "VOC", "-v", version, "-s", "300", "--root", str(voc_folder), "-b", "2"]
    options += ["--max_iters", "1", "--date", "a", "--test_frequency", "0"]
    assert main([*machine, *options]) == 0
    run = tmp_path / "w" / f"{version}_300" / "a"
    assert main([*machine, "--test", str(run / "last.pth")]) == 0
    (results,) = run.rglob("results.json")
    assert json.loads(results.read_text())["images"] == 4
