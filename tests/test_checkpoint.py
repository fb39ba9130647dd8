"""Checkpoints: what is read, what is refused, and that a file is never half written."""

import hashlib
import json
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import (
    load_checkpoint,
    load_weights,
    read_hashed,
    save_checkpoint,
    save_safetensors,
    sha256_of,
)
from utils.errors import UserError


@pytest.mark.parametrize("mmap", [False, True])
def test_a_checkpoint_round_trips_exactly(tmp_path, mmap):
    state = {
        "model": {"a.weight": torch.randn(3, 4), "a.count": torch.tensor(7)},
        "classes": ["x", "ä b"], "config": {"lr": 4e-3, "sets": [[None, "train"]]}, "step": 12,
    }
    save_checkpoint(tmp_path / "c.pth", state)
    loaded = load_checkpoint(tmp_path / "c.pth", mmap)
    assert all(loaded[key] == state[key] for key in ("classes", "config", "step"))
    for key, tensor in state["model"].items():
        assert torch.equal(loaded["model"][key], tensor)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.model."])
def test_a_bare_state_dict_loads_without_the_prefixes_of_wrappers(tmp_path, prefix, zipped):
    state = OrderedDict({f"{prefix}a.weight": torch.ones(2), f"{prefix}model.b": torch.ones(1)})
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    assert list(load_checkpoint(tmp_path / "c.pth")["model"]) == ["a.weight", "model.b"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("value", "name"), [
    (np.float64(3), "scalar"), (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (Path("x"), "pathlib.PosixPath"),
])
def test_a_type_that_is_not_opened_is_named_with_the_fix(tmp_path, value, name, zipped):
    path = tmp_path / "c.pth"
    torch.save({"w": torch.ones(1), "x": value}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"c\.pth .*{name}.*save model\.state_dict"):
        load_checkpoint(path)
    torch.jit.script(nn.Linear(1, 1)).save(path)
    with pytest.raises(UserError, match=r"c\.pth .*TorchScript.*save model\.state_dict"):
        load_checkpoint(path)


def test_a_flipped_bit_and_a_file_that_inflates_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"w": torch.ones(64)}, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\0\0\x80\x3f", b"\0\0\x90\x3f", 1))
    with pytest.raises(UserError, match=r"c\.pth is damaged.*data/0"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", bytes(1 << 29))
    with pytest.raises(UserError, match=r"c\.pth is damaged.*inflate to 536870912"):
        load_checkpoint(path)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth.*could run code .*mkdir"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("content", [b"", b"<html>quota exceeded</html>", b"# A page\n", "half"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content, mmap):
    path = tmp_path / "c.pth"
    if content == "half":
        save_checkpoint(path, {"model": {"w": torch.randn(1000)}})
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.pth is damaged, is not a PyTorch file") as caught:
        load_checkpoint(path, mmap)
    assert "weights_only" not in str(caught.value)  # nobody is told to open it unsafely


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"c\.pth does not exist.*give the path"):
        load_checkpoint(tmp_path / "c.pth")
    for odd in ("/dev/zero", "a\0", "a" * 999):
        with pytest.raises(UserError, match="does not exist or is not a file"):
            load_checkpoint(odd)
    with pytest.raises(UserError, match="is a folder; give a checkpoint in it"):
        load_checkpoint(tmp_path)


def test_entries_that_are_no_tensors_are_named(tmp_path):
    for state, words in (({"epoch": 3, "w": torch.ones(1)}, "no named tensors: epoch"),
                         ([1, 2], "holds a list")):
        torch.save(state, tmp_path / "c.pth")
        with pytest.raises(UserError, match=words):
            load_checkpoint(tmp_path / "c.pth")


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def doubled(depth):
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation", "ignore:TypedStorage")
@pytest.mark.parametrize(("entries", "words"), [
    ({"format": 99}, "format 99"), ({"format": torch.zeros(2)}, "format a Tensor"),
    ({"classes": ["a", "\ud800"]}, "not a list of names"), ({"config": [1]}, "it holds a list"),
    ({"config": {"lr": torch.zeros(1)}}, "it holds a Tensor"),
    ({"config": {(1, 2): 1}}, "a key that is no text"),
    ({"model": {"a\ud800": torch.zeros(1)}}, r"named tensors: 'a\\ud800'"),
    ({"config": {"lr": doubled(99)}}, "more than 100000 values"),
    ({"config": {"root": "a\0"}}, "NUL"), ({"config": {"lr": 1 << 64}}, "more than 64 bits"),
    ({"model": {"w": torch.zeros(1).expand(1 << 40)}}, "repeated.*: w"),
    ({"model": {(1, 2): torch.zeros(1)}}, "named tensors: a tuple"),
    ({"model": {"w": torch.zeros(2, dtype=torch.complex64)}},
     "1 tensors that are complex.*: w"),
    ({"model": {"w": torch.eye(2).to_sparse()}}, "sparse.*: w"),
    ({"model": {"w": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}}, "quant.*: w"),
    ({"model": {"w": torch.empty(2, device="meta")}}, "without data: w"),
])
def test_entries_that_no_checkpoint_has_are_refused_in_one_sentence(tmp_path, entries, words):
    torch.save({"model": {"w": torch.ones(1)}, **entries}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"c\.pth .*{words}") as error:
        load_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_a_deep_configuration_is_no_traceback(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "c.safetensors"
    for depth in (300, 100_000):
        text = '{"x":' * depth + "1" + "}" * depth
        safetensors.save_file({"a": torch.ones(1)}, path, {"config": text})
        if depth == 300:
            assert load_checkpoint(path)["config"] == json.loads(text)
    with pytest.raises(UserError, match=r"c\.safetensors.*RecursionError"):
        load_checkpoint(path)
    torch.save({"model": {"a": torch.ones(1)}, "config": nested(200)}, tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth")["config"] == nested(200)


@pytest.mark.parametrize("keys", ["[[1]]", "[{}]", "{}", "1", '["b"]', "null"])
def test_an_order_of_other_tensors_is_not_followed(tmp_path, keys):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors", {"keys": keys})
    assert list(load_checkpoint(tmp_path / "c.safetensors")["model"]) == ["a"]


@pytest.mark.parametrize(("model", "about"), [
    ({"w": torch.eye(2).to_sparse()}, {}), ({"w": torch.empty(2, device="meta")}, {}),
    ({"a\ud800": torch.ones(1)}, {}), ({"w": torch.ones(1)}, {"config": nested(100_000)}),
    ({"w": torch.ones(1)}, {"config": {"x": torch.ones(1)}}),
])
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
    for value, words in ((torch.ones(2, dtype=torch.int64), "whole numbers"),
                         (torch.tensor([1, torch.nan]), "not finite"), (torch.ones(3), "mismatch")):
        with pytest.raises(UserError, match=rf"c\.pth .*{words}.*1\.weight"):
            load_weights(net, {**other.state_dict(), "1.weight": value}, "c.pth")


def test_a_state_dict_beside_the_state_of_a_classifiers_training_loads(tmp_path):
    beside = {"epoch": 9, "classes": 1000, "optimizer": {}, 5: 1}
    for key in ("state_dict", "model_state_dict", "net"):
        torch.save({**beside, key: {"model": {"module.a": torch.ones(2)}}}, tmp_path / "c.pth")
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
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "c.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.safetensors needs .*pip install safetensors"):
        load_checkpoint(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="pip install safetensors"):
        save_safetensors(tmp_path / "d.safetensors", {"a": torch.ones(1)}, {})


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 700_000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc" * 700_000).hexdigest()


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path):
    file, contents = tmp_path / "f", iter([b"b", b"c"])
    file.write_bytes(b"a")

    def read(path):
        found = path.read_bytes()
        for new in contents:
            file.write_bytes(new)
            break
        return found

    assert read_hashed(file, read) == (b"c", hashlib.sha256(b"c").hexdigest())
    with pytest.raises(UserError, match="no.pth does not exist"):
        read_hashed(tmp_path / "no.pth", load_checkpoint)
