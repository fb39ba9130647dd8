"""Checkpoints: what is read, what is refused, and that a file is never half written."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from models import BACKBONES
from models.hardnet import HARDNET_SPECS, HarDNetBase
from models.vgg import VGGBase
from utils.checkpoint import (
    load_base,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_safetensors,
    sha256_of,
)
from utils.errors import UserError


@pytest.fixture(scope="module")
def base():
    return HarDNetBase(HARDNET_SPECS[68])


def test_a_checkpoint_round_trips_exactly(tmp_path):
    state = {
        "model": {"a.weight": torch.randn(3, 4), "a.count": torch.tensor(7)},
        "classes": ["x", "ä b"],
        "config": {"lr": 4e-3, "sets": [[None, "train"]]},
        "step": 12,
    }
    save_checkpoint(tmp_path / "c.pth", state)
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert {k: loaded[k] for k in ("classes", "config", "step")} == {
        k: state[k] for k in ("classes", "config", "step")
    }
    for key, tensor in state["model"].items():
        assert torch.equal(loaded["model"][key], tensor)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_state_dict_loads_with_and_without_the_dataparallel_prefix(tmp_path, prefix):
    torch.save(OrderedDict({f"{prefix}a.weight": torch.ones(2)}), tmp_path / "c.pth")
    assert list(load_checkpoint(tmp_path / "c.pth")["model"]) == ["a.weight"]


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth.*run code are not opened"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"<html>quota exceeded</html>", "damaged"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "c.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"c\.pth.*{words}"):
        load_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "c.pth", {"model": {"w": torch.randn(1000)}})
    data = (tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"c\.pth is damaged"):
        load_checkpoint(tmp_path / "c.pth")


def test_entries_that_are_no_tensors_are_named(tmp_path):
    torch.save({"epoch": 3, "w": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="1 entries that are no named tensors: epoch"):
        load_checkpoint(tmp_path / "c.pth")
    torch.save([1, 2], tmp_path / "c.pth")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tmp_path / "c.pth")


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    torch.save({"format": 99, "model": {"w": torch.ones(1)}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="format 99"):
        load_checkpoint(tmp_path / "c.pth")


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"format": torch.zeros(2)}, "format a Tensor"),
        ({"format": "1\n"}, r"format '1\\n'"),
        ({"classes": [1, 2]}, "not a list of names"),
        ({"classes": torch.zeros(2)}, "not a list of names"),
        ({"classes": "person"}, "not a list of names"),
        ({"classes": ["a", "\ud800"]}, "not a list of names"),
        ({"config": [1]}, "it is a list"),
        ({"config": {"lr": torch.zeros(1)}}, "Tensor is not JSON serializable"),
        ({"config": {(1, 2): 1}}, "keys must be str"),
        ({"model": {"a\ud800": torch.zeros(1)}}, r"named tensors: 'a\\ud800'"),
        ({"model": {(1, 2): torch.zeros(1)}}, "named tensors: a tuple"),
        (
            {"model": {"w": torch.zeros(2, dtype=torch.complex64)}},
            "1 tensors that are complex.*: w",
        ),
        ({"model": {"w": torch.eye(2).to_sparse()}}, "sparse.*: w"),
        ({"model": {"w": torch.empty(2, device="meta")}}, "without data: w"),
    ],
)
def test_entries_that_no_checkpoint_has_are_refused_in_one_sentence(tmp_path, entries, words):
    torch.save({"model": {"w": torch.ones(1)}, **entries}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"c\.pth .*{words}") as error:
        load_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(error.value)
    str(error.value).encode()


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation", "ignore:TypedStorage")
def test_quantised_tensors_are_refused_in_one_sentence(tmp_path):
    pytest.importorskip("safetensors")
    model = {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    with pytest.raises(UserError, match=r"c\.safetensors cannot be written: "):
        save_safetensors(tmp_path / "c.safetensors", model, {})
    torch.save(model, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c\.pth holds no state dict .*quantised.*: w"):
        load_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("depth", [300, 100_000])
def test_a_deep_configuration_is_no_traceback(tmp_path, depth):
    safetensors = pytest.importorskip("safetensors.torch")
    text = '{"x":' * depth + "1" + "}" * depth
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors", {"config": text})
    if depth == 300:
        torch.save({"model": {"a": torch.ones(1)}, "config": nested(200)}, tmp_path / "c.pth")
        assert load_checkpoint(tmp_path / "c.pth")["config"] == nested(200)
        assert load_checkpoint(tmp_path / "c.safetensors")["config"] == json.loads(text)
    else:
        with pytest.raises(UserError, match=r"c\.safetensors.*RecursionError"):
            load_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("keys", ["[[1]]", "[{}]", "{}", "1", '["b"]', "null"])
def test_an_order_of_other_tensors_is_not_followed(tmp_path, keys):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors", {"keys": keys})
    assert list(load_checkpoint(tmp_path / "c.safetensors")["model"]) == ["a"]


@pytest.mark.parametrize(
    ("model", "about"),
    [
        ({"w": torch.eye(2).to_sparse()}, {}),
        ({"w": torch.empty(2, device="meta")}, {}),
        ({"a\ud800": torch.ones(1)}, {}),
        ({"w": torch.ones(1)}, {"config": nested(100_000)}),
        ({"w": torch.ones(1)}, {"config": {"x": torch.ones(1)}}),
    ],
)
def test_what_safetensors_cannot_hold_is_one_sentence_and_no_file(tmp_path, model, about):
    pytest.importorskip("safetensors")
    with pytest.raises(UserError, match=r"c\.safetensors cannot be written: .*keep it as \.pth"):
        save_safetensors(tmp_path / "c.safetensors", model, about)
    assert os.listdir(tmp_path) == []


def test_weights_of_a_pytorch_without_batch_counters_load():
    net, other = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    state = other.state_dict()
    del state["1.num_batches_tracked"]  # but with the version that PyTorch notes beside it
    load_weights(net, state, "c.pth")
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in state.items())
    assert net[1].num_batches_tracked == 0
    del state["1.running_mean"]
    with pytest.raises(UserError, match=r"c\.pth does not fit the network: .*1\.running_mean"):
        load_weights(net, state, "c.pth")


def test_a_failed_write_leaves_the_earlier_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {"w": torch.ones(1)}})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"c\.pth could not be written.*No space left"):
        save_checkpoint(path, {"model": {"w": torch.zeros(1)}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize("prefix", ["", "base.", "module.", "module.base."])
def test_base_weights_load_whatever_their_prefix(tmp_path, base, prefix):
    torch.save({prefix + k: torch.full_like(t, 3) for k, t in base.state_dict().items()},
               tmp_path / "b.pth")  # fmt: skip
    fresh = HarDNetBase(HARDNET_SPECS[68])
    match = load_base(fresh, tmp_path / "b.pth")
    assert (len(match.tensors), match.source) == (len(base.state_dict()), "a base network")
    assert match.unused == match.missing == []
    assert all((t == 3).all() for t in fresh.state_dict().values())


def test_base_weights_of_a_pytorch_without_batch_counters_load(tmp_path, base):
    state = {k: t for k, t in base.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "b.pth")
    load_base(HarDNetBase(HARDNET_SPECS[68]), tmp_path / "b.pth")


def test_base_weights_that_do_not_all_fit_are_listed_and_nothing_is_loaded(tmp_path):
    base = VGGBase()
    state = base.state_dict()
    before = {k: t.clone() for k, t in state.items()}
    changed = {k: torch.zeros_like(t) for k, t in state.items() if k != "33.bias"}
    changed |= {"0.weight": torch.zeros(2), "classifier.weight": torch.zeros(2)}
    torch.save(changed, tmp_path / "b.pth")
    with pytest.raises(UserError) as error:
        load_base(base, tmp_path / "b.pth")
    for words in (
        "only 28 of the base network's 30 tensors",
        "1 of another shape: 0.weight [2] instead of [64, 3, 3, 3]",
        "1 missing: 33.bias",
        "1 unused: classifier.weight",
    ):
        assert words in str(error.value)
    assert all(torch.equal(t, before[k]) for k, t in base.state_dict().items())


SSD_BASES = ["SSD_HarDNet68", "SSD_HarDNet85", "SSD_vgg", "SSD_resnet101", "SSD_mobile"]


@pytest.fixture(scope="module")
def bases():
    """version -> an empty copy of its base; tests give it memory and numbers."""

    def build(version):
        with torch.device("meta"):
            return BACKBONES[version].base().to_empty(device="cpu")

    return build


def full_of(value, state, prefix=""):
    return {prefix + key: torch.full_like(tensor, value) for key, tensor in state.items()}


@pytest.mark.parametrize("parallel", ["", "module."])
@pytest.mark.parametrize("version", SSD_BASES)
def test_a_whole_detector_gives_its_base(tmp_path, bases, caplog, version, parallel):
    base = bases(version)
    others = {"extras.0.weight": torch.zeros(1), "loc.0.bias": torch.zeros(1)}
    state = full_of(3, base.state_dict(), "base.") | others
    torch.save({parallel + key: tensor for key, tensor in state.items()}, tmp_path / "d.pth")
    with caplog.at_level("INFO"):
        match = load_base(base, tmp_path / "d.pth", BACKBONES[version].from_classifier)
    assert match.source == "the base of a detector"
    assert (match.unused, match.missing) == (list(others), [])
    assert all((tensor == 3).all() for tensor in base.state_dict().values())
    assert "2 not used: extras.0.weight, loc.0.bias" in caplog.text


def hardnet_classifier(base, blocks):
    """The layers of ``base`` that the classifier has, its own last block and its head."""
    state = {k: t for k, t in full_of(2, base.state_dict(), "base.").items()
             if int(k.split(".")[1]) < blocks}  # fmt: skip
    end = f"base.{blocks + 1}"
    return state | {f"{end}.layers.0.conv.weight": torch.zeros(4), f"{end}.3.bias": torch.zeros(9)}


@pytest.mark.parametrize(
    ("version", "stages", "new"),
    [("SSD_HarDNet68", 13, "13."), ("SSD_HarDNet85", 15, None), ("SSD_HarDNet68ds", 13, None),
     ("SSD_HarDNet39ds", 11, None), ("RFB_HarDNet68", 13, "13.")],
)  # fmt: skip
def test_the_familys_classifier_gives_its_stages_and_a_bridge_stays_new(
    tmp_path, bases, version, stages, new
):
    base = bases(version)
    torch.save(hardnet_classifier(base, stages), tmp_path / "c.pth")
    base.load_state_dict(full_of(7, base.state_dict()))
    match = load_base(base, tmp_path / "c.pth", BACKBONES[version].from_classifier)
    assert match.source == "a classifier"
    assert [key.split(".")[1] for key in match.unused] == [str(stages + 1)] * 2
    assert all(key.startswith(new) for key in match.missing) and bool(match.missing) == bool(new)
    for key, tensor in base.state_dict().items():
        assert (tensor == (7 if new and key.startswith(new) else 2)).all(), key


@pytest.mark.parametrize("drop", ["base.12.", "base.8.layers.3.", "base.0."])
def test_a_classifier_without_one_of_its_stages_is_refused(tmp_path, bases, drop):
    base = bases("SSD_HarDNet68")
    state = hardnet_classifier(base, 13)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(drop)}
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"only \d+ of .*missing: .*{drop[5:]}"):
        load_base(base, tmp_path / "c.pth", BACKBONES["SSD_HarDNet68"].from_classifier)


@pytest.mark.parametrize("file, version", [("85", "SSD_HarDNet68"), ("68", "SSD_HarDNet85")])
def test_a_classifier_of_another_size_is_refused_by_its_shapes(tmp_path, bases, file, version):
    torch.save(hardnet_classifier(bases(f"SSD_HarDNet{file}"), 13), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"of another shape: .*instead of"):
        load_base(bases(version), tmp_path / "c.pth", BACKBONES[version].from_classifier)


@pytest.mark.parametrize("drop", ["base.13.", "base.12.", "base."])
def test_a_detector_without_a_part_of_its_base_is_no_classifier(tmp_path, bases, drop):
    base = bases("SSD_HarDNet68")
    state = full_of(2, base.state_dict(), "base.") | {"conf.0.bias": torch.zeros(126)}
    state = {key: tensor for key, tensor in state.items() if not key.startswith(drop)}
    torch.save(state, tmp_path / "d.pth")
    base.load_state_dict(full_of(7, base.state_dict()))
    with pytest.raises(UserError, match=rf"only \d+ of .*missing: .*{drop[5:]}"):
        load_base(base, tmp_path / "d.pth", BACKBONES["SSD_HarDNet68"].from_classifier)
    assert all((tensor == 7).all() for tensor in base.state_dict().values())


@pytest.mark.parametrize(
    ("version", "name", "head"),
    [("SSD_resnet101", "resnet101", "fc."), ("SSD_mobile", "mobilenet_v2", "classifier.")],
)
def test_torchvisions_classifiers_give_their_layers_but_no_head(
    tmp_path, bases, version, name, head
):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        classifier = getattr(models, name)(weights=None).to_empty(device="cpu")
    torch.save(full_of(2, classifier.state_dict()), tmp_path / "c.pth")
    base = bases(version)
    match = load_base(base, tmp_path / "c.pth", BACKBONES[version].from_classifier)
    assert match.source == "a classifier"
    assert match.missing == [] and all(key.startswith(head) for key in match.unused)
    assert all((tensor == 2).all() for tensor in base.state_dict().values())


def test_vgg16_reducedfc_has_the_positions_of_the_published_list(tmp_path, bases):
    widths = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256),
              14: (256, 256), 17: (512, 256), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512)),
              31: (1024, 512), 33: (1024, 1024)}  # fmt: skip
    state = {}
    for i, (outputs, inputs) in widths.items():
        kernel = 1 if i == 33 else 3
        state[f"{i}.weight"] = torch.full((outputs, inputs, kernel, kernel), float(i))
        state[f"{i}.bias"] = torch.full((outputs,), float(i))
    torch.save(state, tmp_path / "vgg16_reducedfc.pth")
    base = bases("SSD_vgg")
    match = load_base(base, tmp_path / "vgg16_reducedfc.pth", BACKBONES["SSD_vgg"].from_classifier)
    assert (len(match.tensors), match.unused, match.missing) == (30, [], [])
    for i in widths:
        assert (base[i].weight == i).all() and (base[i].bias == i).all()


def test_the_lists_in_the_log_are_cut(tmp_path, bases, caplog):
    base = bases("SSD_vgg")
    more = {f"extras.{i}.weight": torch.zeros(1) for i in range(25)}
    torch.save(full_of(1, base.state_dict(), "base.") | more, tmp_path / "d.pth")
    with caplog.at_level("INFO"):
        load_base(base, tmp_path / "d.pth")
    assert "25 not used: extras.0.weight" in caplog.text
    assert caplog.text.rstrip().endswith("extras.19.weight and 5 more")


def test_a_state_dict_beside_the_state_of_a_classifiers_training_loads(tmp_path):
    beside = {"epoch": 9, "classes": 1000, "optimizer": {}, 5: 1}
    torch.save({**beside, "state_dict": {"module.a": torch.ones(2)}}, tmp_path / "c.pth")
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert list(loaded) == ["model", "beside"] and list(loaded["model"]) == ["a"]
    assert loaded["beside"] == ["epoch", "classes", "optimizer"]


def test_safetensors_keep_tensors_order_classes_and_configuration(tmp_path):
    pytest.importorskip("safetensors")
    strided = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    model = {"z": strided, "a": torch.tensor(7), "m": torch.ones(2, dtype=torch.bfloat16)}
    model["same"] = model["m"]
    about = {"classes": ["x", "ä b"], "config": {"lr": 4e-3, "sets": [[None, "train"]]}}
    save_safetensors(tmp_path / "c.safetensors", model, about)
    loaded = load_checkpoint(tmp_path / "c.safetensors")
    assert {key: loaded[key] for key in about} == about
    assert list(loaded["model"]) == list(model)
    for key, tensor in model.items():
        assert torch.equal(loaded["model"][key], tensor)
        assert loaded["model"][key].dtype == tensor.dtype


def test_foreign_and_damaged_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "c.safetensors"
    safetensors.save_file({"module.a": torch.ones(1000)}, path, {"format": "pt"})
    assert list(load_checkpoint(path)) == ["model"] and "a" in load_checkpoint(path)["model"]
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:20], b"", b"<html>", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"c\.safetensors is damaged"):
            load_checkpoint(path)
    safetensors.save_file({"a": torch.ones(1)}, path, {"config": "YAML: 1"})
    with pytest.raises(UserError, match="its metadata are none of this program"):
        load_checkpoint(path)


def test_without_safetensors_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "c.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.safetensors needs .*pip install safetensors"):
        load_checkpoint(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="pip install safetensors"):
        save_safetensors(tmp_path / "d.safetensors", {"a": torch.ones(1)}, {})


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 700_000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc" * 700_000).hexdigest()


def test_a_text_is_no_checkpoint_and_nobody_is_told_to_open_it_all_the_same(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# A page\n")
    with pytest.raises(UserError, match="is not a PyTorch file") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)
