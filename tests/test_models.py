"""Networks: structure, numbers of parameters, published state dicts and published outputs."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import PRIORS, VOC_300
from layers import PriorBox
from models import BACKBONES, build_net, prior_config
from models.hardnet import HARDNET_SPECS, Bridge, HarDBlock, HarDNetBase, harmonic_links
from models.identify import closest, identify
from models.ssd import SSD, ssd_extras

GOLDENS = Path(__file__).parent / "goldens"
STATE_DICTS = sorted((GOLDENS / "state_dicts").glob("*.json"))
FORWARDS = sorted((GOLDENS / "forward").glob("*.npz"))


def parse_name(path: Path) -> tuple[str, int, int]:
    version, size, num_classes = path.stem.rsplit("_", 2)
    return version, int(size), int(num_classes)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
    state = build_net(*parse_name(path)).state_dict()
    assert [[key, list(t.shape)] for key, t in state.items()] == json.loads(path.read_text())
    assert identify(state) == parse_name(path)


def published_net(path: Path) -> torch.nn.Module:
    """The network of a golden of ``FORWARDS``, with its weights."""
    net = build_net(*parse_name(path)).eval()
    net.load_state_dict({k: golden_weight(k, tuple(t.shape)) for k, t in net.state_dict().items()})
    return net


@torch.no_grad()
def assert_published_outputs(net: torch.nn.Module, path: Path) -> None:
    golden, size = np.load(path), parse_name(path)[1]
    noise = np.random.RandomState(int(golden["image_seed"]))
    images = noise.standard_normal((int(golden["batch"]), 3, size, size)) * 50
    outputs = net(torch.from_numpy(images.astype(np.float32)))
    for name, output in zip(("loc", "conf"), outputs, strict=True):
        assert list(output.shape) == list(golden[f"{name}_shape"])
        expected = golden[f"{name}_value"]
        error = output.flatten()[golden[f"{name}_index"]].numpy() - expected
        assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(expected)
        assert float(output.double().norm()) == pytest.approx(float(golden[f"{name}_norm"]), 1e-4)


@pytest.mark.parametrize("path", FORWARDS, ids=lambda p: p.stem)
def test_outputs_equal_the_published_network(path):
    assert_published_outputs(published_net(path), path)


@pytest.mark.parametrize("num_classes", [21, 81])
@pytest.mark.parametrize(
    ("version", "size"),
    [(version, size) for version, row in BACKBONES.items() for size in row.sizes],
)
def test_outputs_have_a_row_per_prior_for_any_number_of_classes(version, size, num_classes):
    with torch.device("meta"):
        net = build_net(version, size, num_classes)
        loc, conf = net(torch.empty(2, 3, size, size))
    # 2,990 = 6 x (19^2 + 10^2 + 5^2 + 3^2) + 4 x (2^2 + 1)
    rows = 2990 if version == "SSD_mobile" else {300: 11620, 512: 32756}[size]
    assert loc.shape == (2, rows, 4)
    assert conf.shape == (2, rows, num_classes)
    for dataset in ("VOC", "COCO"):
        assert PriorBox(prior_config(version, dataset, size))().shape == (rows, 4)


def test_head_rows_are_in_cell_then_box_order():
    net = build_net("SSD_HarDNet68", 300, 3).eval()
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        last = net.sources(images)[-2]
        head = net.loc[-2](last)
        loc, _ = net(images)
    # The last but one map is 3x3 with 4 boxes a cell; the last has one cell with 4 boxes.
    rows = loc[0, -4 - 9 * 4 : -4]
    for i, j, box in ((0, 0, 0), (0, 2, 1), (2, 1, 3)):
        expected = head[0, box * 4 : box * 4 + 4, i, j]
        torch.testing.assert_close(rows[(i * 3 + j) * 4 + box], expected)


def test_training_and_evaluation_mode_return_the_same_pair():
    net = build_net("SSD_vgg", 300, 5)
    images = torch.randn(1, 3, 300, 300)
    with torch.no_grad():
        train, evaluation = net.train()(images), net.eval()(images)
    for a, b in zip(train, evaluation, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_equals_its_images_one_by_one():
    net = build_net("SSD_HarDNet68", 300, 3).eval()
    images = torch.randn(2, 3, 300, 300)
    with torch.no_grad():
        together = net(images)
        apart = [net(image[None]) for image in images]
    for i, whole in enumerate(together):
        assert (whole - torch.cat([a[i] for a in apart])).norm() < 1e-4 * whole.norm()


def test_harmonic_links_follow_the_paper():
    # Worked out by hand from "layer k links to k - 2^n if 2^n divides k" (section 3.1).
    assert [harmonic_links(i) for i in range(1, 9)] == [
        [0], [1, 0], [2], [3, 2, 0], [4], [5, 4], [6], [7, 6, 4, 0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("depth", "outputs"),
    [(68, [124, 262, 328, 654]), (85, [214, 392, 458, 588, 784])],
)
def test_block_outputs_have_the_published_widths(depth, outputs):
    blocks = [m for m in HarDNetBase(HARDNET_SPECS[depth]) if isinstance(m, HarDBlock)]
    assert [block.out_channels for block in blocks] == outputs
    x = torch.randn(1, blocks[0].layers[0].conv.in_channels, 8, 8)
    assert blocks[0](x).shape == (1, outputs[0], 8, 8)


def test_parameter_counts_are_the_published_ones():
    assert count(HarDNetBase(HARDNET_SPECS[68])) == 12_104_928
    assert count(HarDNetBase(HARDNET_SPECS[85])) == 17_883_548
    assert count(Bridge(720)) == 6_915_360
    assert count(build_net("SSD_HarDNet68", 512, 81)) == 25_700_414
    assert count(build_net("SSD_HarDNet85", 512, 81)) == 38_782_074
    assert count(build_net("SSD_HarDNet68", 300, 21)) == 17_260_864
    assert count(build_net("SSD_HarDNet85", 300, 21)) == 30_083_324


def test_new_layers_start_from_zero_bias_and_the_scale_from_twenty():
    net = build_net("SSD_HarDNet85", 512, 3)
    for layer in (*net.extras, *net.loc, *net.conf):
        assert not layer.bias.any()
        assert layer.weight.std() > 0
    assert (net.L2Norm.weight == 20).all()
    # Kaiming normal, fan-out: variance 2 / (out_channels * kernel area).
    weight = net.bridge[1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (960 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("SSD_HarDNet99", 300, 21), ("SSD_HarDNet99", "SSD_HarDNet68, SSD_HarDNet85, SSD_vgg")),
        (("SSD_HarDNet68", 400, 21), ("400", "300, 512")),
        (("SSD_mobile", 512, 21), ("SSD_mobile does not exist at size 512", "choose from 300")),
        (("SSD_HarDNet68", 300, 1), ("num_classes is 1", "2")),
    ],
)
def test_unknown_network_names_the_choices(arguments, words):
    with pytest.raises(ValueError) as error:
        build_net(*arguments)
    assert all(word in str(error.value) for word in words)


def test_priors_that_do_not_fit_the_source_maps_are_refused_with_both_numbers(monkeypatch):
    wrong = VOC_300.__class__(**{**vars(VOC_300), "feature_maps": (38, 19, 10, 5, 3, 2)})
    monkeypatch.setitem(PRIORS, ("VOC", 300), wrong)
    with pytest.raises(ValueError, match=r"5, 3, 1\).*5, 3, 2\)"):
        build_net("SSD_vgg", 300, 3)


def test_number_of_source_maps_must_be_that_of_the_priors():
    base = HarDNetBase(HARDNET_SPECS[68])
    with pytest.raises(ValueError, match="6 source maps.*5"):
        SSD(base, ssd_extras(640, 300), (6, 6, 6, 4, 4), 3)


def test_identify_refuses_foreign_tensors_and_names_the_first_difference():
    state = build_net("SSD_HarDNet68", 300, 4).state_dict()
    state["extras.3.weight"] = torch.zeros(7, 7)
    with pytest.raises(ValueError, match=r"SSD_HarDNet68 at 300: extras\.3\.weight \[7, 7\]"):
        identify(state)
    with pytest.raises(ValueError, match="no known detector"):
        identify({"weight": torch.zeros(3)})


def test_a_state_dict_without_batch_counters_is_identified():
    with torch.device("meta"):
        state = build_net("RFB_HarDNet85", 512, 81).state_dict()
    old = {key: tensor for key, tensor in state.items() if "num_batches_tracked" not in key}
    assert len(old) < len(state) and identify(old) == ("RFB_HarDNet85", 512, 81)


def test_the_closest_detector_is_that_of_a_comparison_with_all():
    """Whatever is missing: a part of the base, of the heads, or what tells SSD from RFB."""
    whole = {}
    for version, row in BACKBONES.items():
        for size in row.sizes:
            with torch.device("meta"):
                whole[version, size] = build_net(version, size, 21).state_dict()
    state = whole["SSD_HarDNet85", 300]
    for cut in ("base.1", "base.", "conf.", "bridge.", "extras.", "loc.3"):
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


def test_building_a_net_prints_nothing_and_reads_no_file(capsys, monkeypatch):
    monkeypatch.setattr("builtins.open", None)
    build_net("SSD_HarDNet85", 300, 3)
    assert capsys.readouterr() == ("", "")
