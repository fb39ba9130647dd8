"""Published files, and the command that downloads, inspects and converts: all on made-up files."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY

import models
from models import BACKBONES, build_net
from models import pretrained as weights
from models.pretrained import PUBLISHED, examine, main, published
from train_test import main as train_test
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Made-up files of the published kinds: name -> path."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = build_net("SSD_HarDNet68", 300, 21)
    state = net.state_dict()
    base = {key: tensor for key, tensor in state.items() if key.startswith("base.")}
    classifier = {key: tensor for key, tensor in base.items() if int(key.split(".")[1]) < 13}
    kinds = {
        "detector": state,
        "parallel": {f"module.{key}": tensor for key, tensor in state.items()},
        "base": net.base.state_dict(),
        "classifier": classifier | {"base.16.3.bias": torch.zeros(1000)},
        "old": {k: t for k, t in state.items() if "num_batches_tracked" not in k},
        "damaged": {k: t for k, t in state.items() if not k.startswith("base.13.")},
        "odd": {**state, "conf.0.weight": torch.tensor(1.0)},
        "other": {k: t for k, t in state.items() if k != "conf.1.bias"} | {"x": torch.zeros(1)},
    }
    for name, tensors in kinds.items():
        torch.save(dict(tensors), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in kinds}


# ---------------------------------------------------------------- the table


def test_every_row_names_detectors_that_exist_and_a_known_kind_of_hash():
    for row in PUBLISHED:
        assert set(row.versions) <= set(BACKBONES), row
        assert row.url.startswith("https://") and row.file.endswith(".pth") and row.licence
        kind, _, value = (row.checksum or "none:").partition(":")
        assert len(value) == {"git": 40, "sha256": 8, "none": 0}[kind]
        if kind == "sha256":  # as the publishers write it into the name
            assert row.file.endswith(f"-{value}.pth")
        assert (row.size is None) == (row.num_classes is None)
    for field in ("name", "file", "url"):
        assert len({getattr(row, field) for row in PUBLISHED}) == len(PUBLISHED)


def test_every_detector_finds_the_files_that_its_base_starts_from():
    rows = {row.file: row for row in PUBLISHED if row.size is None}
    for version, backbone in BACKBONES.items():
        for file in {backbone.weights, backbone.classifier} - {None}:
            assert version in rows[file].versions, version


def test_the_page_of_the_folder_has_every_row():
    page = (ROOT / "weights" / "README.md").read_text("utf-8")
    for row in PUBLISHED:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{row.name}` ")]
        value = (row.checksum or ":none").partition(":")[2]
        for text in (f"`{row.file}`", row.url, value, row.licence, *row.versions):
            assert text in line, (row.name, text)


def test_list_prints_them_and_an_unknown_name_is_answered_with_all(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(row.url in printed and row.fits in printed for row in PUBLISHED)
    assert main(["download", "hardnet99"]) == 2
    assert "hardnet99 is no published file; choose from hardnet68-base," in capsys.readouterr().err
    assert published("vgg16_reducedfc.pth") is published("vgg16-reducedfc")


# ---------------------------------------------------------------- download


@pytest.fixture
def server(files):
    """A host of the made-up files; the last word of the path says how it behaves."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name, _, behaviour = self.path[1:].partition("/")
            content = files[name].read_bytes()
            if behaviour == "gone":
                return self.send_error(404)
            if behaviour == "wrong":
                content = content[:-1] + b"?"
            if behaviour == "page":
                content = b"<!DOCTYPE html><html>quota exceeded</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:5000] if behaviour in ("slow", "truncated") else content)
            if behaviour == "slow":
                released.wait(10)

        def log_message(self, *args):
            pass

    released = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def offer(server, monkeypatch):
    """offer(name, kind, behaviour, **changes): let a row of the table lead to the local host."""

    def set_row(name, kind, behaviour="", **changes):
        row = replace(published(name), url=f"{server}/{kind}/{behaviour}", **changes)
        others = [other for other in PUBLISHED if other.name != name]
        monkeypatch.setattr(weights, "PUBLISHED", (*others, row))

    return set_row


def sha256(path):
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def git(path):
    return "git:" + subprocess.check_output(["git", "hash-object", path], text=True).strip()


@pytest.mark.parametrize("hash_of", [sha256, git])
def test_download_is_verified_and_put_in_place(offer, files, tmp_path, capsys, hash_of):
    offer("hardnet68-base", "base", checksum=hash_of(files["base"]))
    assert main(["download", "hardnet68-base", "--to", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "hardnet68_base_bridge.pth"
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == files["base"].read_bytes()
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("gone", "no longer gives it out"),
        ("wrong", "it has the sha256"),
        ("page", "it has the sha256"),
        ("slow", "timed out"),
        ("truncated", "stopped at byte"),
    ],
)
def test_a_bad_answer_leaves_the_earlier_file(offer, files, tmp_path, behaviour, words):
    offer("hardnet68", "classifier", behaviour, checksum=sha256(files["classifier"]))
    path = tmp_path / "hardnet68-5d684880.pth"
    path.write_bytes(b"earlier")
    with pytest.raises(UserError) as caught:
        weights.download("hardnet68", tmp_path, timeout=0.2, tries=1)
    assert words in str(caught.value) and f"put it at {path}" in str(caught.value)
    assert path.read_bytes() == b"earlier"


def test_a_file_without_a_published_hash_is_judged_by_its_tensors(offer, files, tmp_path, capsys):
    name, command = "vgg16-reducedfc", ["download", "vgg16-reducedfc", "--to", str(tmp_path)]
    for kind, behaviour, words in (
        ("base", "", "its tensors are not those of --basenet of SSD_vgg"),
        ("base", "page", "is damaged"),
    ):
        offer(name, kind, behaviour)
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and f"put it at {tmp_path / 'vgg16_reducedfc.pth'}" in error
        assert os.listdir(tmp_path) == []
    offer(name, "base", versions=("SSD_HarDNet68",))
    assert main(command) == 0
    assert os.listdir(tmp_path) == ["vgg16_reducedfc.pth"]


def test_google_drive_without_gdown_is_refused_with_link_and_place(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert main(["download", "ssd512-hardnet68-coco", "--to", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for text in ("1IHXvQMsQbuwYbuxW7HjFQHhGSX6SKz70", "SSD-HarDNet68.pth", "pip install gdown"):
        assert text in line


# ---------------------------------------------------------------- inspect


@pytest.mark.parametrize("kind", ["old", "detector"])
def test_a_detector_of_drive_is_judged_by_its_tensors_but_counters(
    offer, files, tmp_path, monkeypatch, kind
):
    def download(url=None, output=None, quiet=False, use_cookies=True, id=None, resume=False):
        Path(output).write_bytes(files[kind].read_bytes())
        return output

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=download))
    name = "ssd512-hardnet68-coco"
    with pytest.raises(UserError, match="its tensors are not those of SSD_HarDNet68 at 512, 81"):
        weights.download(name, tmp_path)
    row = replace(published(name), size=300, num_classes=21)
    monkeypatch.setattr(weights, "PUBLISHED", (row,))
    assert weights.download(name, tmp_path).read_bytes() == files[kind].read_bytes()


def test_a_detector_of_a_pytorch_without_batch_counters_is_named(files):
    found = examine(files["old"])
    assert (found["version"], found["size"], found["num_classes"]) == ("SSD_HarDNet68", 300, 21)
    assert found["missing"] == [] and found["basenet"] == ["SSD_HarDNet68", "RFB_HarDNet68"]


def test_a_detector_without_a_part_of_its_base_is_compared_to_the_whole(files):
    found = examine(files["damaged"])
    assert found["closest"].startswith("SSD_HarDNet68 at 300") and found["basenet"] == []
    assert found["missing"] and all(key.startswith("base.13.") for key in found["missing"])
    assert (found["version"], found["unused"], found["wrong"]) == (None, [], [])


def test_a_head_that_is_a_number_is_of_another_shape(files, capsys):
    assert main(["inspect", str(files["odd"])]) == 0
    assert "conf.0.weight [] instead of [" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert main(["inspect", str(files["other"])]) == 0
    assert "SSD_resnet101 was not compared: " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_odd_files_are_one_sentence(tmp_path, capsys, command):
    tensors = {"a\ud800": torch.ones(1)}, {"w": torch.zeros(1, dtype=torch.complex64)}
    for i, model in enumerate(tensors):
        torch.save(model, tmp_path / "c.pth")
        more = [str(tmp_path / f"{i}.safetensors")] if command == "convert" else []
        assert main([command, str(tmp_path / "c.pth"), *more]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def test_configurations_of_any_depth_convert_or_are_refused(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    source = tmp_path / "c.safetensors"
    for depth in (100, 400, 700, 950, 2000, 9000, 100_000):
        text = '{"x":' * depth + "1" + "}" * depth
        safetensors.save_file({"a": torch.ones(1)}, source, {"config": text})
        target = tmp_path / f"{depth}.pth"
        status = main(["convert", str(source), str(target)])
        error = capsys.readouterr().err
        assert (status, error.count("\n"), target.exists()) in [(0, 0, True), (2, 1, False)], depth
        assert depth != 100 or status == 0
    assert status == 2 and not list(tmp_path.glob("*.tmp"))


def test_what_a_foreign_checkpoint_holds_is_listed_and_left_out_with_a_notice(tmp_path, capsys):
    pytest.importorskip("safetensors")
    source, target = tmp_path / "c.pth", tmp_path / "c.safetensors"
    torch.save({"state_dict": {"w": torch.ones(1)}, "optimizer": {}, "classes": 9}, source)
    assert examine(source)["holds"] == ["model", "classes", "optimizer"]
    assert main(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target} (left out: classes, optimizer)\n"


def test_a_file_is_read_once_for_each_hash(files, monkeypatch):
    asked = []
    digest = weights.file_digest
    monkeypatch.setattr(weights, "file_digest", lambda p, n: asked.append(n) or digest(p, n))
    examine(files["base"])
    assert sorted(asked) == ["git", "sha256"]


@pytest.mark.parametrize("kind", ["detector", "parallel"])
def test_a_detector_is_named_with_its_classes_and_hashes(files, capsys, kind):
    found = examine(files[kind])
    assert (found["version"], found["size"], found["num_classes"]) == ("SSD_HarDNet68", 300, 21)
    assert found["missing"] == found["unused"] == found["wrong"] == []
    assert found["parameters"] == 17_260_864  # as published code has them
    assert found["tensors"] == 425
    assert (sha256(files[kind]).endswith(found["sha256"][:8]), found["origin"]) == (True, None)
    assert found["git_blob"] == git(files[kind])[4:]
    assert main(["inspect", str(files[kind])]) == 0
    assert "SSD_HarDNet68 at 300, 21 classes with background" in capsys.readouterr().out


def test_a_base_file_and_a_classifier_say_what_they_start(files, capsys):
    base, classifier = examine(files["base"]), examine(files["classifier"])
    for found in (base, classifier):
        assert found["basenet"] == ["SSD_HarDNet68", "RFB_HarDNet68"]
        assert found["version"] is None
    assert base["missing"] == base["unused"] == []
    assert base["parameters"] == 12_104_928
    assert classifier["unused"] == ["base.16.3.bias"]
    assert all(key.startswith("13.") for key in classifier["missing"])
    assert main(["inspect", str(files["classifier"])]) == 0
    assert "a classifier for SSD_HarDNet68" in capsys.readouterr().out


def test_a_near_miss_is_compared_to_the_closest_detector(files, capsys):
    assert main(["inspect", str(files["other"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] is None
    assert found["closest"] == "SSD_HarDNet68 at 300, 21 classes with background"
    assert (found["missing"], found["unused"]) == (["conf.1.bias"], ["x"])
    assert main(["inspect", str(files["other"])]) == 0
    printed = capsys.readouterr().out
    assert "missing      1: conf.1.bias" in printed and "unused       1: x" in printed


def test_a_published_file_is_recognised_by_its_hash(files, monkeypatch, capsys):
    row = replace(published("hardnet68-base"), checksum=git(files["base"]))
    monkeypatch.setattr(weights, "PUBLISHED", (row,))
    assert examine(files["base"])["origin"] == "hardnet68-base"
    assert main(["inspect", str(files["base"])]) == 0
    assert "hardnet68-base, https://raw.githubusercontent.com" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_file_that_would_run_code_is_refused_unopened(tmp_path, capsys, command):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    torch.save({"a": torch.ones(1), "b": Payload()}, tmp_path / "evil.pth")
    more = [str(tmp_path / "out.safetensors")] if command == "convert" else []
    assert main([command, str(tmp_path / "evil.pth"), *more]) == 2
    assert "files that would run code are not opened" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["evil.pth"]


# ---------------------------------------------------------------- convert


@pytest.mark.parametrize("kind", ["detector", "parallel", "base", "classifier"])
def test_a_bare_state_dict_comes_back_exactly(files, tmp_path, kind):
    safetensors = pytest.importorskip("safetensors")
    there, back = tmp_path / "x.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(files[kind]), str(there)]) == 0
    assert main(["convert", str(there), str(back)]) == 0
    before = load_checkpoint(files[kind])["model"]
    after = torch.load(back, weights_only=True)
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype
    with safetensors.safe_open(there, "pt") as file:
        about = file.metadata()
    identity = {"version": '"SSD_HarDNet68"', "size": "300"}
    expected = identity if kind in ("detector", "parallel") else {}
    assert {key: about[key] for key in about if key != "keys"} == expected


def test_a_checkpoint_keeps_classes_and_configuration_but_no_optimizer(tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors")
    saved = {
        "model": {"w": torch.randn(3)},
        "classes": ["ä", "b c"],
        "config": {"version": "SSD_vgg", "size": 300, "lr": 4e-3, "test_sets": [[None, "test"]]},
    }
    save_checkpoint(tmp_path / "c.pth", {**saved, "optimizer": {"lr": 1}, "step": 3})
    there, back = tmp_path / "c.safetensors", tmp_path / "back.pth"
    assert main(["convert", str(tmp_path / "c.pth"), str(there)]) == 0
    assert capsys.readouterr().out == f"{there} (left out: optimizer, step)\n"
    with safetensors.safe_open(there, "pt") as file:
        about = {key: json.loads(text) for key, text in file.metadata().items()}
    assert about == {"version": "SSD_vgg", "size": 300, "keys": ["w"], "classes": saved["classes"],
                     "config": saved["config"]}  # fmt: skip
    assert main(["convert", str(there), str(back)]) == 0
    after = load_checkpoint(back)
    assert torch.equal(after.pop("model")["w"], saved["model"]["w"])
    assert after == {"classes": saved["classes"], "config": saved["config"], "format": 1}


def test_names_that_say_no_conversion_and_files_that_exist_are_refused(files, tmp_path, capsys):
    assert main(["convert", str(files["base"]), str(tmp_path / "b.pth")]) == 2
    assert "one of the two must end in .safetensors" in capsys.readouterr().err
    (tmp_path / "b.safetensors").write_bytes(b"mine")
    assert main(["convert", str(files["base"]), str(tmp_path / "b.safetensors")]) == 2
    assert "b.safetensors exists" in capsys.readouterr().err
    assert (tmp_path / "b.safetensors").read_bytes() == b"mine"


def test_a_converted_checkpoint_tests_as_the_original(tmp_path, voc_folder, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    common = ["--save_folder", str(tmp_path), "--device", "cpu", "--num_workers", "0"]
    options = ["--root", str(voc_folder), "-v", "tiny", "-s", "300", "-b", "4", "-max", "1"]
    assert train_test([*options, *common, "--date", "a", "--test_frequency", "0"]) == 0
    run = tmp_path / "tiny_300" / "a"
    path = run / "Final_tiny_VOC.pth"
    assert main(["convert", str(path), str(run / "converted.safetensors")]) == 0
    scores = []
    for file in (path, run / "converted.safetensors"):
        assert train_test(["--test", str(file), *common]) == 0
        results = run / "ss_predict" / file.stem / "test" / "results.json"
        scores.append(json.loads(results.read_text()))
    for key in ("value", "per_class", "detection_count", "classes"):
        assert scores[0].get(key) == scores[1].get(key)
    start = ["--resume_net", str(run / "converted.safetensors"), "--test_frequency", "0"]
    assert train_test([*options, *common, "--date", "b", *start]) == 0


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "models.pretrained"]
    done = subprocess.run([*command, "list"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "inspect", "gone.pth"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(b"error: gone.pth does not exist")
