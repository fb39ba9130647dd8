"""Networks: structure, parameters, published state dicts and outputs, and identification."""

import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models.identify
from data.config import COCO_512, MOBILE_300, PRIORS, VOC_300
from layers import MultiBoxLoss, PriorBox
from models import BACKBONES, build_net, hardnet, prior_config
from models.identify import bases_here, closest, identify
from models.ssd import SSD, ssd_extras
from train_test import main
from utils.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"
STATE_DICTS = sorted((GOLDENS / "state_dicts").glob("*.json"))
FORWARDS = sorted((GOLDENS / "forward").glob("*.npz"))
NETWORKS = [(version, size) for version, row in BACKBONES.items() for size in row.sizes]


def parse_name(path: Path) -> tuple[str, int, int]:
    version, size, num_classes = path.stem.rsplit("_", 2)
    return version, int(size), int(num_classes)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- the published networks


def golden_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weights that the published networks were run with, a function of each key alone."""
    n = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        n = np.exp(0.2 * n)
    elif key.endswith("num_batches_tracked"):
        n = np.zeros(shape)
    elif key == "L2Norm.weight":
        n = 20 + n
    elif len(shape) == 4:
        n = n * np.sqrt(2 / (shape[1] * shape[2] * shape[3]))
    elif key.endswith("weight"):
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.as_tensor(np.asarray(n, np.float32))


@pytest.mark.parametrize("path", STATE_DICTS, ids=lambda p: p.stem)
def test_state_dict_has_the_published_names_order_and_shapes(path):
    with torch.device("meta"):
        state = build_net(*parse_name(path)).state_dict()
    assert [[key, list(t.shape)] for key, t in state.items()] == json.loads(path.read_text())


def weighted(net: torch.nn.Module) -> torch.nn.Module:
    """Load golden weights, so that evaluation mode shows every layer."""
    net.load_state_dict({k: golden_weight(k, tuple(t.shape)) for k, t in net.state_dict().items()})
    return net.eval()


@pytest.mark.parametrize("path", FORWARDS, ids=lambda p: p.stem)
@torch.no_grad()
def test_outputs_equal_the_published_network(path):
    golden, (version, size, num_classes) = np.load(path), parse_name(path)
    noise = np.random.RandomState(int(golden["image_seed"]))
    images = noise.standard_normal((int(golden["batch"]), 3, size, size)) * 50
    net = weighted(build_net(version, size, num_classes))
    outputs = net(torch.from_numpy(images.astype(np.float32)))
    for name, output in zip(("loc", "conf"), outputs, strict=True):
        assert list(output.shape) == list(golden[f"{name}_shape"])
        expected = golden[f"{name}_value"]
        error = output.flatten()[golden[f"{name}_index"]].numpy() - expected
        assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(expected)
        assert float(output.double().norm()) == pytest.approx(float(golden[f"{name}_norm"]), 1e-4)


@pytest.fixture(scope="module")
def bases():
    return bases_here()


@pytest.mark.parametrize(("version", "size"), NETWORKS)
def test_outputs_have_a_row_per_prior_and_tensors_tell_the_detector(version, size, bases,
                                                                    monkeypatch):
    with torch.device("meta"):
        net = build_net(version, size, 7)
        loc, conf = net(torch.empty(2, 3, size, size))
    # 2,990 = 6 x (19^2 + 10^2 + 5^2 + 3^2) + 4 x (2^2 + 1)
    rows = 2990 if version == "SSD_mobile" else {300: 11620, 512: 32756}[size]
    assert (loc.shape, conf.shape) == ((2, rows, 4), (2, rows, 7))
    for dataset in ("VOC", "COCO"):
        assert PriorBox(prior_config(version, dataset, size))().shape == (rows, 4)
    monkeypatch.setattr(models.identify, "bases_here", lambda: bases)
    assert identify(net.state_dict()) == (version, size, 7)


def test_new_layers_start_from_zero_bias_and_the_scale_from_twenty():
    net = build_net("SSD_HarDNet85", 512, 3)
    for layer in (*net.extras, *net.loc, *net.conf):
        assert not layer.bias.any()
        assert layer.weight.std() > 0
    assert (net.L2Norm.weight == 20).all()
    # Kaiming normal, fan-out: variance 2 / (out_channels * kernel area).
    weight = net.bridge[1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (960 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("make", "arguments", "words"), [
    (build_net, ("SSD_HarDNet99", 300, 21), "SSD_HarDNet99.*SSD_HarDNet68, SSD_HarDNet85"),
    (build_net, ("SSD_HarDNet68", 400, 21), "400.*300, 512"),
    (build_net, ("SSD_HarDNet68", 300, 1), "num_classes is 1.*2"),
    (prior_config, ("SSD_mobile", "VOC", 512), "does not exist at size 512, choose from 300"),
    (prior_config, ("SSD_resnet", "VOC", 300), "unknown version 'SSD_resnet'.*SSD_resnet101"),
    (prior_config, ("SSD_vgg", "LVIS", 300), "'LVIS', choose from VOC, COCO")])
def test_what_does_not_exist_is_refused_with_the_choices(make, arguments, words):
    with pytest.raises(ValueError, match=words):
        make(*arguments)


def test_priors_that_do_not_fit_the_source_maps_are_refused_with_both_numbers(monkeypatch):
    wrong = replace(VOC_300, feature_maps=(38, 19, 10, 5, 3, 2))
    monkeypatch.setitem(PRIORS, ("VOC", 300), wrong)
    with pytest.raises(ValueError, match=r"5, 3, 1\).*5, 3, 2\)"):
        build_net("SSD_vgg", 300, 3)


def test_number_of_source_maps_must_be_that_of_the_priors():
    with torch.device("meta"):
        base = hardnet.HarDNetBase(hardnet.HARDNET_SPECS[68])
    with pytest.raises(ValueError, match="6 source maps.*5"):
        SSD(base, ssd_extras(640, 300), (6, 6, 6, 4, 4), 3)


def test_building_a_net_prints_nothing_and_reads_no_file(capsys, monkeypatch):
    monkeypatch.setattr("builtins.open", None)
    with torch.device("meta"):
        build_net("SSD_HarDNet85", 300, 3)
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- parameters


def ssd_count(version: str, size: int, num_classes: int, base: int, channels: tuple) -> int:
    """Parameters of an SSD, by hand: base, scale of source 1, extras and heads."""
    # A convolution has a bias, or a norm's scale and shift, for each output.
    each = 2 if version.endswith("bn") else 1
    steps = [(256, 512, 3), *[(128, 256, 3)] * 3]
    if size == 512:
        steps += [(128, 256, 4)]
    total, width = base + channels[0], channels[1]
    for narrow, out, kernel in steps:
        total += width * narrow + narrow * out * kernel**2 + each * (narrow + out)
        width = out
    sources = [*channels, *(out for _, out, _ in steps)]
    boxes = [6] * (len(sources) - 2) + [4, 4]
    per_box = 4 + num_classes
    return total + sum((9 * c + each) * a * per_box
                       for c, a in zip(sources, boxes, strict=True))


BRIDGE_DS = 2 * 640 * 640 + 9 * 640 + 3 * 2 * 640
# The classifier's parameters as torchvision states them, less its head's.
RESNET101 = 44_549_160 - (2048 * 1000 + 1000)
MOBILENET = 3_504_872 - (1280 * 1000 + 1000)


@pytest.mark.parametrize(("version", "base", "channels", "pinned"), [
    ("SSD_vgg", 20_483_904, (512, 1024), {512: 36_821_726}),
    ("SSD_resnet101", RESNET101, (512, 2048), {300: 62_067_296, 512: 63_800_286}),
    ("SSD_mobile", MOBILENET, (576, 1280), {300: 18_363_104}),
    ("SSD_HarDNet68ds", 1_473_260 + BRIDGE_DS, (320, 640), {300: 14_164_556, 512: 15_897_546}),
    ("SSD_HarDNet39ds", 912_682 + BRIDGE_DS, (320, 640), {300: 13_603_978, 512: 15_336_968}),
    ("SSD_HarDNet68bn", 12_104_928, (320, 640), {300: 23_972_064, 512: 25_705_948}),
    ("SSD_HarDNet39dsbn", 912_682 + BRIDGE_DS, (320, 640), {300: 13_608_618, 512: 15_342_502})])
def test_parameters_of_a_detector_are_those_counted_by_hand(version, base, channels, pinned):
    for size, total in pinned.items():
        with torch.device("meta"):
            net = build_net(version, size, 81)
        assert count(net) == ssd_count(version, size, 81, base, channels) == total
    if version.endswith("ds"):
        assert count(hardnet.DepthwiseBridge(640)) == count(net.bridge) == BRIDGE_DS


# ---------------------------------------------------------------- HarDNet


def test_harmonic_links_follow_the_paper():
    # Worked out by hand from "layer k links to k - 2^n if 2^n divides k" (section 3.1).
    links = [[0], [1, 0], [2], [3, 2, 0], [4], [5, 4], [6], [7, 6, 4, 0]]
    assert [hardnet.harmonic_links(i) for i in range(1, 9)] == links


@pytest.mark.parametrize(
    ("name", "growth", "channels", "millions", "gmacs"),
    [(68, 160, 1024, 17.6, 4.3), (85, 256, 1280, 36.7, 9.1), ("68ds", 160, 1024, 4.2, 0.8),
     ("39ds", 160, 1024, 3.5, 0.44)])
def test_with_their_last_block_the_bases_have_the_published_size_and_work(name, growth, channels,
                                                                          millions, gmacs):
    """The classifiers: one more halving, block of 4 layers and 1000 classes, at 224 pixels."""
    spec = hardnet.HARDNET_SPECS[name]
    whole = replace(spec, growth=(*spec.growth, growth), layers=(*spec.layers, 4),
                    channels=(*spec.channels, channels),
                    pool_after={**spec.pool_after, len(spec.layers) - 1: False},
                    dilated_bridge=False)
    with torch.device("meta"):
        classifier = hardnet.HarDNetBase(whole).eval()
        with FlopCounterMode(display=False) as counter:
            _, last = classifier(torch.empty(1, 3, 224, 224))
    assert last.shape == (1, channels, 7, 7)
    assert round((count(classifier) + channels * 1000 + 1000) / 1e6, 1) == millions
    macs = counter.get_total_flops() / 2 + channels * 1000
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.035)


@pytest.mark.parametrize("name", ["68ds", "39ds"])
def test_depthwise_members_have_pairs_in_the_blocks_and_strided_convolutions_for_pools(name):
    base = hardnet.HarDNetBase(hardnet.HARDNET_SPECS[name])
    assert not [m for m in base.modules() if isinstance(m, torch.nn.MaxPool2d)]
    assert not [m for m in base.modules() if type(m) is torch.nn.ReLU]
    strides = [m.dwconv.stride for m in base if isinstance(m, hardnet.DWConvLayer)]
    assert strides == [(2, 2)] * 3
    for block in (m for m in base if isinstance(m, hardnet.HarDBlock)):
        for layer in block.layers:
            assert list(dict(layer.named_children())) == ["layer1", "layer2"]
            assert isinstance(layer.layer1, hardnet.ConvLayer)
            assert layer.layer1.conv.kernel_size == (1, 1)
            assert layer.layer2.dwconv.groups == layer.layer1.conv.out_channels
    with torch.no_grad():
        first, second = base(torch.randn(1, 3, 96, 96))
    assert (first.shape, second.shape) == ((1, 320, 12, 12), (1, 640, 6, 6))
    assert 0 <= float(first.min()) and float(first.max()) <= 6


# ---------------------------------------------------------------- receptive-field blocks


@pytest.mark.parametrize(("version", "size", "like"),
                         [("RFB_HarDNet68", 300, "RFB_HarDNet85_300_21"),
                          ("RFB_HarDNet85", 512, "RFB_HarDNet68_512_81")])
def test_sizes_without_a_published_listing_differ_from_the_other_depth_in_the_base_alone(
    version, size, like
):
    """Beside the base, 640 or 720 channels enter extras.0, whose t is an eighth of them."""
    golden = json.loads((GOLDENS / "state_dicts" / f"{like}.json").read_text())
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
_NORM = {"branch0": [_S, (1, 1, 1)], "branch1": [_S, (1, (1, 0), 1), (1, 3, 3)],
         "branch2": [_S, (1, (0, 1), 1), (1, 3, 3)],
         "branch3": [_S, (1, (0, 1), 1), (1, (1, 0), 1), (1, 5, 5)]}


def _extra(stride: int, visual: int) -> dict[str, list]:
    return {"branch0": [_S, (stride, 1, 1), (1, visual + 1, visual + 1)],
            "branch1": [_S, (1, 1, 1), (stride, 1, 1), (1, 2 * visual + 1, 2 * visual + 1)]}


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


@torch.no_grad()
def test_receptive_fields_equal_their_definition_written_out():
    net = weighted(build_net("RFB_HarDNet68", 512, 3))
    state = net.state_dict()
    x = torch.randn(2, 320, 12, 11)
    torch.testing.assert_close(net.Norm(x), field(state, "Norm", _NORM, x), rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 640, 9, 8)
    for i, (stride, visual) in enumerate([(1, 2), (2, 2), (2, 2), (2, 1), (2, 1)]):
        expected = field(state, f"extras.{i}", _extra(stride, visual), x, stride)
        x = net.extras[i](x)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_new_layers_of_the_rfb_networks_start_from_kaiming_fan_out_and_zero_bias():
    net = build_net("RFB_HarDNet68", 300, 3)
    for conv in (net.extras[0].branch0[1].conv, net.Norm.ConvLinear.conv, net.extras[4].conv):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
    assert net.Norm.branch0[0].bn.momentum == 0.01
    assert not any(head.bias.any() for head in (*net.loc, *net.conf))


# ---------------------------------------------------------------- bases of torchvision's layers


@pytest.mark.parametrize(("version", "name", "options", "nodes", "shapes"), [
    ("SSD_resnet101", "resnet101",
     {"replace_stride_with_dilation": (False, False, True)}, ["layer2", "layer4"],
     [(512, 12, 12), (2048, 6, 6)]),
    ("SSD_mobile", "mobilenet_v2", {}, ["features.14.conv.0", "features.18"],
     [(576, 6, 6), (1280, 3, 3)])])
@torch.no_grad()
def test_maps_are_those_of_torchvisions_network(version, name, options, nodes, shapes):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    classifiers = pytest.importorskip("torchvision.models")
    reference = weighted(getattr(classifiers, name)(weights=None, **options))
    base = BACKBONES[version].base().eval()
    state = {k.removeprefix("features."): t for k, t in reference.state_dict().items()}
    base.load_state_dict({key: state[key] for key in base.state_dict()})
    x = torch.randn(1, 3, 96, 96)
    expected = extraction.create_feature_extractor(reference, nodes)(x)
    maps = base(x)
    assert [m.shape[1:] for m in maps] == shapes
    for ours, theirs in zip(maps, expected.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torchvision_that_cannot_be_imported_is_named(monkeypatch):
    with torch.device("meta"):
        foreign = {**build_net("SSD_mobile", 300, 3).state_dict(), "more": torch.zeros(1)}
        hard = build_net("RFB_HarDNet85", 300, 3).state_dict()
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    words = r"ResNet101.*torchvision.*cannot be imported beside torch.*pip install torch==\d\S+ tor"
    with pytest.raises(UserError, match=words):
        build_net("SSD_resnet101", 300, 21)
    # The others are still found, and an answer that may be incomplete says so.
    assert identify(hard) == ("RFB_HarDNet85", 300, 3)
    with pytest.raises(ValueError, match="SSD_resnet101 was not compared.*SSD_mobile was not"):
        identify(foreign)


# ---------------------------------------------------------------- priors and sizes


def test_mobile_priors_are_the_published_ones():
    assert MOBILE_300.num_priors == 6 * (361 + 100 + 25 + 9) + 4 * (4 + 1)
    boxes = PriorBox(MOBILE_300)()
    # First cell: centre 8 of 300; 45, sqrt(45 x 90), and 45 x sqrt(2) by 45 / sqrt(2).
    centre, side = 8 / 300, (45 * 90) ** 0.5 / 300
    first = [[centre, centre, 0.15, 0.15], [centre, centre, side, side],
             [centre, centre, 0.15 * 2**0.5, 0.15 / 2**0.5]]
    torch.testing.assert_close(boxes[:3], torch.tensor(first))
    # The last map is one cell in the middle: 270 and sqrt(270 x 315).
    torch.testing.assert_close(boxes[-4], torch.tensor([0.5, 0.5, 0.9, 0.9]))
    torch.testing.assert_close(boxes[-3, 2], torch.tensor((270 * 315) ** 0.5 / 300))


def test_priors_are_chosen_by_version_data_set_and_size():
    for dataset in ("VOC", "COCO"):
        assert prior_config("SSD_mobile", dataset, 300) is MOBILE_300
    assert prior_config("RFB_HarDNet85", "VOC", 300) is VOC_300
    assert prior_config("SSD_resnet101", "COCO", 512) is COCO_512


# ---------------------------------------------------------------- identification


def test_identify_refuses_foreign_tensors_and_names_the_first_difference():
    with torch.device("meta"):
        state = build_net("SSD_HarDNet68", 300, 4).state_dict()
    state["extras.3.weight"] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match=r"SSD_HarDNet68 at 300: extras\.3\.weight \[7, 7\]"):
        identify(state)
    with pytest.raises(ValueError, match="no known detector"):
        identify({"weight": torch.zeros(3)})


def test_the_closest_detector_is_that_of_a_comparison_with_all():
    """Whatever is missing: a part of the base, of the heads, or what tells SSD from RFB."""
    whole = {}
    for version, row in BACKBONES.items():
        for size in row.sizes:
            with torch.device("meta"):
                whole[version, size] = build_net(version, size, 21).state_dict()
    state = whole["SSD_HarDNet85", 300]
    for cut in ("base.1", "base.", "conf.", "bridge.", "loc.3"):
        part = {key: tensor for key, tensor in state.items() if not key.startswith(cut)}
        part["more"] = torch.zeros(1)
        found = closest(part)
        shapes = {key: tensor.shape for key, tensor in part.items()}

        def differences(row, shapes=shapes):
            both = [key for key in row.keys() | shapes if "num_batches" not in key]
            wrong = sum(row[k].shape != shapes[k] if k in row and k in shapes else 1 for k in both)
            return wrong + sum("num_batches" in k for k in shapes if k not in row)

        if cut != "conf.":  # without it the number of classes is taken to be 2
            assert found.count == min(map(differences, whole.values())), cut
            assert found.num_classes == 21
        assert found.unused[-1] == "more" or cut == "base."
        if cut != "base.":
            missing = [k for k in state if k.startswith(cut) and "num_batches" not in k]
            assert (found.version, found.size, found.missing) == ("SSD_HarDNet85", 300, missing)


@pytest.mark.parametrize("shape", [(), (0,), (1 << 50, 0)])
def test_a_class_head_without_a_number_of_classes_belongs_to_nothing(shape):
    with torch.device("meta"):
        state = build_net("SSD_vgg", 300, 21).state_dict()
        state["conf.0.weight"] = torch.empty(shape)
    with pytest.raises(ValueError, match=r"SSD_vgg at 300: conf\.0\.weight \["):
        identify(state)


# ---------------------------------------------------------------- training


ROWS = [name for name in BACKBONES if name not in ("SSD_HarDNet68", "SSD_HarDNet85", "SSD_vgg")]


@pytest.mark.parametrize("version", ROWS)
def test_one_step_reaches_every_weight_even_with_one_image(version):
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


@pytest.mark.parametrize(
    "version",
    [name if "mobile" in name else pytest.param(name, marks=pytest.mark.slow) for name in ROWS])
def test_every_row_trains_and_tests(version, voc_folder, tmp_path):
    machine = ["--save_folder", str(tmp_path / "w"), "--device", "cpu", "--num_workers", "0"]
    options = ["-d", "VOC", "-v", version, "-s", "300", "--root", str(voc_folder), "-b", "2"]
    options += ["--max_iters", "1", "--date", "a", "--test_frequency", "0"]
    assert main([*machine, *options]) == 0
    run = tmp_path / "w" / f"{version}_300" / "a"
    assert main([*machine, "--test", str(run / "last.pth")]) == 0
    (results,) = run.rglob("results.json")
    assert json.loads(results.read_text())["images"] == 4


def test_normed_heads_start_with_three_hard_negatives_for_a_positive():
    net = build_net("SSD_HarDNet39dsbn", 300, 5)
    for head in net.conf:
        logits = head.norm.bias.view(-1, 5)  # what a norm adds to outputs of mean 0
        assert head.bias is None
        assert logits.softmax(1)[:, 0].tolist() == pytest.approx([0.75] * len(logits))
