"""The command line end to end on small data sets, with a network small enough for a test."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY

import models
import train_test
from data.config import COCO_300, COCO_CLASSES
from data.loading import TrainingSet
from engine.options import parser
from layers import PriorBox
from models import build_net
from train_test import main, resolve
from utils.checkpoint import load_checkpoint, sha256_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)


@pytest.fixture
def call(tmp_path, voc_folder):
    """main() on the folder of own classes: call(*options) trains or tests the tiny network."""

    def run(*options, root=voc_folder, version="tiny"):
        common = ["--save_folder", str(tmp_path / "w"), "--device", "cpu", "--num_workers", "0"]
        if "--test" not in options:
            common += ["-d", "VOC", "-v", version, "-s", "300", "--root", str(root), "-b", "2"]
        return main([*common, *map(str, options)])

    run.folder = tmp_path / "w" / "tiny_300"
    return run


def weights(path):
    return load_checkpoint(path)["model"]


def assert_same_run(a: Path, b: Path):
    """Two runs ended with the same weights, optimiser state and log, to the last bit."""
    first, second = (load_checkpoint(run / "Final_tiny_VOC.pth") for run in (a, b))
    for key, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][key]), key
    for key, state in first["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second["optimizer"]["state"][key][name]), (key, name)
    logs = [[json.loads(line) for line in (r / "log.jsonl").read_text().splitlines()]
            for r in (a, b)]  # fmt: skip
    for line in (line for log in logs for line in log):
        for key in ("seconds", "images_per_second", "waiting_for_data"):
            line.pop(key, None)
    assert logs[0] == logs[1]


# ---------------------------------------------------------------- training


def test_a_run_leaves_checkpoints_log_configuration_and_scores(call):
    assert call("-max", 4, "--date", "a", "--save_frequency", 2, "--test_frequency", 2) == 0
    run = call.folder / "a"
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "tiny_VOC_epoches_2.pth", "tiny_VOC_epoches_4.pth", "Final_tiny_VOC.pth", "last.pth",
        "train.log", "log.jsonl", "config.json", "ss_predict",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".part")]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert ["value" in line for line in lines] == [False, True, False, True]
    results = json.loads((run / "ss_predict" / "epoch_4" / "test" / "results.json").read_text())
    assert results["per_class"].keys() == {"cell", "platelet", "rod"}
    assert results["value"] == lines[-1]["value"]
    assert results["thresholds"]["score"] == 0.01
    saved = load_checkpoint(run / "Final_tiny_VOC.pth")
    assert saved["classes"] == ["cell", "platelet", "rod"]
    assert saved["config"]["weight_decay"] == 5e-4
    assert saved["model"]["conf.0.weight"].shape[0] == 6 * 4


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_run_equals_a_straight_one(call, stop):
    common = ("-max", 3, "--test_frequency", 1, "--amp", "bf16")
    assert call(*common, "--date", "straight") == 0
    assert call(*common, "--date", "broken", "--max_iters", stop, "--test_frequency", 1) == 0
    assert call(*common, "--date", "broken", "--resume", "auto") == 0
    assert_same_run(call.folder / "straight", call.folder / "broken")


@pytest.mark.parametrize(
    "machine, kept, expected", [(2, {}, 2), (64, {}, 8), (2, {"num_workers": 6}, 6)]
)
def test_a_core_has_one_loading_process_unless_asked(monkeypatch, machine, kept, expected):
    monkeypatch.setattr(train_test, "cores", lambda: machine)
    assert train_test.resolve({}, kept)["num_workers"] == expected
    assert train_test.resolve({"num_workers": 9}, kept)["num_workers"] == 9


def test_resume_needs_nothing_but_the_path(call, tmp_path):
    assert call("-max", 2, "--date", "a", "--lr", 1e-3, "--seed", 4, "--max_iters", 2) == 0
    assert main(["--resume", str(call.folder / "a" / "last.pth"), "--device", "cpu"]) == 0
    saved = load_checkpoint(call.folder / "a" / "Final_tiny_VOC.pth")
    assert saved["step"] == 6
    assert (saved["config"]["lr"], saved["config"]["seed"]) == (1e-3, 4)


def test_resume_auto_takes_the_newest_run_of_the_data_and_else_starts_one(call, capsys):
    assert call("--resume", "auto", "--date", "a", "-max", 2, "--max_iters", 1) == 0
    said = capsys.readouterr().out
    assert "no run to go on with: a new one starts" in said and "resumed" not in said
    assert call("--resume", "auto", "--max_iters", 2) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    assert [p.name for p in call.folder.iterdir()] == ["a"]


def test_a_folder_is_no_checkpoint(call, capsys):
    assert call("--date", "a", "--max_iters", 1, "--test_frequency", 0) == 0
    capsys.readouterr()
    assert call("--test", call.folder / "a") == 2
    assert "a is a folder; give a checkpoint in it, such as last.pth" in capsys.readouterr().err


def test_a_run_that_another_process_trains_is_left_alone(call, capsys):
    assert call("-max", 2, "--date", "a", "--max_iters", 1, "--test_frequency", 0) == 0
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from utils.files import locked\n"
         "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()",
         str(call.folder / "a" / ".lock")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    before = (call.folder / "a" / "last.pth").read_bytes()
    assert call("--resume", "auto", "--date", "a") == 2
    assert "another process" in capsys.readouterr().err
    assert (call.folder / "a" / "last.pth").read_bytes() == before
    holder.communicate("")
    assert call("--resume", "auto", "--date", "a") == 0


def test_picture_that_vanishes_during_a_run_is_named_and_the_state_saved(
    call, voc_folder, capsys, monkeypatch
):
    read = TrainingSet.__getitem__

    def vanish(self, key):
        if key[0] == 1:
            self.dataset.image_path(key[1]).unlink(missing_ok=True)
        return read(self, key)

    monkeypatch.setattr(TrainingSet, "__getitem__", vanish)
    assert call("-max", 3, "--date", "a", "--test_frequency", 0, "--num_workers", 1) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "JPEGImages" in error
    assert error.count("\n") == 1
    assert load_checkpoint(call.folder / "a" / "last.pth")["step"] == 3


def test_loss_that_is_not_finite_names_the_pictures_and_keeps_the_last_good_checkpoint(
    call, capsys
):
    assert call("-max", 1, "--date", "a", "--test_frequency", 0) == 0
    assert call("--resume", "auto", "--date", "a", "-max", 40, "--lr", 1e8, "-we", 0) == 2
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "lower --lr" in error
    kept = load_checkpoint(call.folder / "a" / "last.pth")
    assert kept["step"] >= 3
    assert all(t.isfinite().all() for t in kept["model"].values())


def test_picture_whose_loss_is_not_finite_is_named(call, capsys, monkeypatch):
    read = TrainingSet.__getitem__

    def poison(self, key):
        image, target, index = read(self, key)
        target[:, :4] = np.nan if self.dataset.ids[index] == "b2" else target[:, :4]
        return image, target, index

    monkeypatch.setattr(TrainingSet, "__getitem__", poison)
    assert call("-max", 1, "--date", "a", "--test_frequency", 0) == 2
    error = capsys.readouterr().err
    assert "b2.jpg" in error
    assert "nothing was saved yet" in error
    assert not list((call.folder / "a").glob("*.pth"))


def test_a_data_set_smaller_than_a_batch_trains(call, make_voc, tmp_path):
    sets = {"trainval": {"a": [("x", (5, 5, 40, 40))]}, "test": {"b": [("x", (9, 9, 50, 60))]}}
    folder = make_voc(tmp_path / "one", sets)
    assert call("-max", 1, "--date", "a", "-b", 32, root=folder) == 0


def test_devkit_trains_on_both_years_and_is_scored_by_the_11_point_metric(call, voc_devkit):
    assert call("-max", 1, "--date", "a", root=voc_devkit) == 0
    results = call.folder / "a" / "ss_predict" / "final" / "2007_test" / "results.json"
    assert json.loads(results.read_text())["metric"] == "VOC07 11-point AP@.5"
    assert len(load_checkpoint(call.folder / "a" / "last.pth")["classes"]) == 20


def test_weights_of_a_whole_detector_start_a_new_run(call):
    assert call("-max", 1, "--date", "a", "--test_frequency", 0) == 0
    path = call.folder / "a" / "Final_tiny_VOC.pth"
    options = ("--resume_net", path, "--resume_epoch", 2, "-max", 3, "--date", "b", "--lr", 0)
    assert call(*options) == 0
    new = load_checkpoint(call.folder / "b" / "Final_tiny_VOC.pth")
    assert new["step"] == 9
    assert "all weights from" in new["config"]["start"]
    for key, tensor in weights(path).items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(tensor, new["model"][key])


def test_base_weights_are_counted_in_the_log(call, tmp_path, capsys):
    base = build_net("tiny", 300, 2).base
    torch.save({f"module.{k}": t for k, t in base.state_dict().items()}, tmp_path / "base.pth")
    assert call("--basenet", tmp_path / "base.pth", "--max_iters", 1, "--test_frequency", 0) == 0
    assert "9 of 9 tensors of the base network from" in capsys.readouterr().out


def test_tensorboard_gets_scalars_and_pictures_with_their_boxes(call):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--visdom", "--send_images_to_visdom", "-max", 1, "--test_frequency", 1)
    assert call(*options, "--date", "a") == 0
    events = EventAccumulator(str(call.folder / "a" / "tensorboard")).Reload()
    scalars = {"loss", "loss_loc", "loss_conf", "lr", "images_per_second", "waiting_for_data"}
    assert scalars | {"VOC area AP@.5"} == set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert set(events.Tags()["images"]) == {"training pictures", "detections"}
    (picture,) = events.Images("training pictures")
    assert picture.width > 300  # several pictures beside each other


def test_the_modern_recipe_is_named_and_its_average_is_what_is_tested(call):
    assert call("-max", 2, "--date", "a", "--recipe", "modern", "--clip_norm", 3) == 0
    run = call.folder / "a"
    saved = load_checkpoint(run / "Final_tiny_VOC.pth")
    config = saved["config"]
    assert config["recipe"] == "modern"
    assert (config["schedule"], config["norm_decay"], config["clip_norm"]) == ("cosine", False, 3.0)
    assert saved["average_updates"] == saved["step"] == 6
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.05, 0]
    assert {"exp_avg", "exp_avg_sq"} < saved["optimizer"]["state"][0].keys()
    raw = saved["raw_model"]
    assert any(not torch.equal(tensor, raw[key]) for key, tensor in saved["model"].items())
    kept = np.load(run / "ss_predict" / "final" / "test" / "detections.npz")
    assert call("--test", run / "Final_tiny_VOC.pth", "--score_threshold", 0.01) == 0
    again = np.load(run / "ss_predict" / "Final_tiny_VOC" / "test" / "detections.npz")
    np.testing.assert_array_equal(kept["scores"], again["scores"])


def test_a_resumed_modern_run_equals_a_straight_one(call):
    options = ("-max", 3, "--recipe", "modern", "-we", 1)
    assert call(*options, "--date", "straight") == 0
    assert call(*options, "--date", "broken", "--max_iters", 4) == 0
    assert call("--date", "broken", "--resume", "auto") == 0
    assert_same_run(call.folder / "straight", call.folder / "broken")
    first, second = (
        load_checkpoint(call.folder / run / "last.pth") for run in ("straight", "broken")
    )
    for key, tensor in first["raw_model"].items():
        assert torch.equal(tensor, second["raw_model"][key]), key


@pytest.mark.parametrize(
    "option",
    [("--recipe", "modern"), ("--ema", 0.5), ("--overfit", 2), ("--dataset", "COCO")],
)
def test_a_run_cannot_go_on_with_another_kind_of_training(call, option, capsys):
    assert call("-max", 2, "--date", "a", "--max_iters", 1, "--test_frequency", 0) == 0
    assert call("--resume", "auto", "--date", "a", *option) == 2
    assert f"{option[0]} {option[1]} contradicts" in capsys.readouterr().err


def test_overfitting_trains_and_scores_the_same_pictures_as_they_are(call, capsys, monkeypatch):
    seen = []
    read = TrainingSet.__getitem__

    def note(self, key):
        sample = read(self, key)
        seen.append((key[1], sample[0].copy()))
        return sample

    monkeypatch.setattr(TrainingSet, "__getitem__", note)
    assert call("--overfit", 3, "-max", 2, "--date", "a", "-b", 3, "--test_frequency", 2) == 0
    assert {index for index, _ in seen} == {0, 1, 2}
    for index, image in seen:  # no sample is augmented
        assert all(np.array_equal(image, other) for i, other in seen if i == index)
    results = call.folder / "a" / "ss_predict" / "epoch_2" / "trainval" / "results.json"
    assert json.loads(results.read_text())["images"] == 3
    assert call("--overfit", 60, "--date", "b") == 2
    assert "5 of 6 pictures have objects" in capsys.readouterr().err


def test_resume_auto_takes_a_run_on_as_many_pictures_as_are_asked_for(call, capsys):
    assert call("--date", "all", "--max_iters", 1, "--test_frequency", 0) == 0
    few = ("--overfit", 3, "-b", 3)
    assert call("--date", "few", *few, "--max_iters", 1, "--test_frequency", 0) == 0
    capsys.readouterr()
    assert call("--resume", "auto", "--max_iters", 2) == 0  # the older of the two
    assert f"run {call.folder / 'all'}" in capsys.readouterr().out
    assert call("--resume", "auto", *few, "--max_iters", 2) == 0
    assert f"run {call.folder / 'few'}" in capsys.readouterr().out


def test_a_batch_can_be_trained_in_parts(call, capsys):
    assert call("-max", 1, "--date", "a", "--accumulate", 2, "--test_frequency", 0) == 0
    said = capsys.readouterr().out
    assert "a step: 2 pictures in all (1 processes x 2 accumulation steps x 1)" in said
    assert call("--accumulate", 3) == 2
    assert "give a multiple of 3" in capsys.readouterr().err


def test_a_run_ends_with_the_place_of_each_file(call, capsys):
    assert call("-max", 1, "--date", "a", "--test_frequency", 1) == 0
    said = capsys.readouterr().out
    for name in ("Final_tiny_VOC.pth", "best.pth", "last.pth", "train.log", "log.jsonl"):
        assert str(call.folder / "a" / name) in said
        assert (call.folder / "a" / name).is_file()


def test_training_through_the_compiler_gives_the_same_losses(call):
    for name, options in (("eager", ()), ("compiled", ("--compile",))):
        assert call("-max", 1, "--date", name, "--lr", 1e-5, "--test_frequency", 0, *options) == 0
    records = [
        json.loads((call.folder / name / "log.jsonl").read_text()) for name in ("eager", "compiled")
    ]
    assert records[0]["loss_conf"] == pytest.approx(records[1]["loss_conf"], rel=1e-4)
    saved = load_checkpoint(call.folder / "compiled" / "last.pth")
    assert set(saved["model"]) == set(weights(call.folder / "eager" / "last.pth"))


# ---------------------------------------------------------------- testing


@pytest.fixture
def trained(call):
    assert call("-max", 2, "--date", "a", "--test_frequency", 0) == 0
    return call.folder / "a" / "Final_tiny_VOC.pth"


def test_a_test_takes_all_from_the_checkpoint_and_leaves_results(call, trained):
    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == {"file": trained.name, "sha256": sha256_of(trained)}
    assert results["thresholds"] == {"score": 0.03, "nms": 0.45, "per_class": 50, "per_image": 300}
    assert results["metric"] == "VOC area AP@.5"
    assert results["value"] == pytest.approx(np.mean(list(results["per_class"].values())))
    assert {p.name for p in folder.iterdir()} >= {
        "comp4_det_test_cell.txt", "comp4_det_test_rod.txt", "comp4_det_test_platelet.txt",
        "detections.npz",
    }  # fmt: skip


def test_scoring_the_files_by_themselves_gives_the_same_ap(call, trained, voc_folder, tmp_path):
    from data import voc_eval

    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    out = tmp_path / "ap.json"
    arguments = [str(folder), "--root", str(voc_folder), "--set", "test", "--json", str(out)]
    assert voc_eval.main(arguments) == 0
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(out.read_text())["area"] == results["per_class"]


def test_retest_scores_the_kept_detections_without_the_network(call, trained, monkeypatch, capsys):
    assert call("--test", trained, "--retest") == 2
    assert "no detections to score again" in capsys.readouterr().err
    assert call("--test", trained) == 0
    path = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test" / "results.json"
    first = json.loads(path.read_text())
    monkeypatch.setattr(train_test, "detect_all", None)
    assert call("--test", trained, "--retest") == 0
    assert json.loads(path.read_text()) == first


def test_the_options_of_detection_are_followed_and_recorded(call, trained, monkeypatch, capsys):
    made = []

    class Recording(train_test.Detect):
        def __init__(self, **options):
            made.append(options)
            super().__init__(**options)

    monkeypatch.setattr(train_test, "Detect", Recording)
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"

    def results(*options):
        assert call("--test", trained, *options) == 0
        return json.loads((folder / "results.json").read_text())

    published = results()
    assert made.pop() == {
        "conf_thresh": 0.03, "nms_thresh": 0.45, "per_class": 50, "top_k": 300, "nms": "hard",
        "class_agnostic": False, "background_shortcut": False,
    }  # fmt: skip
    options = ["--score_threshold", 0, "--nms", "soft-gaussian", "--class_agnostic"]
    options += ["--max_detections", 7, "--background_shortcut"]
    other = results(*options)
    assert made.pop() == {
        "conf_thresh": 0, "nms_thresh": 0.45, "per_class": 50, "top_k": 7, "nms": "soft-gaussian",
        "class_agnostic": True, "background_shortcut": True,
    }  # fmt: skip
    assert other["thresholds"] == {"score": 0, "nms": 0.45, "per_class": 50, "per_image": 7}
    assert other["suppression"] == {
        "nms": "soft-gaussian", "class_agnostic": True, "background_shortcut": True,
    }  # fmt: skip
    assert other["detection_count"] == 7 * other["images"] != published["detection_count"]


@pytest.mark.parametrize(
    "option, told",
    [
        (("--score_threshold", 0.4), r"was made with thresholds: score 0\.03, not 0\.4;"),
        (("--max_detections", 8), r"was made with thresholds: per_image 300, not 8;"),
        (("--nms", "soft"), r"was made with suppression: nms 'hard', not 'soft';"),
        (("--class_agnostic", "true"), r"with suppression: class_agnostic False, not True;"),
        (("--background_shortcut", "true"), r"background_shortcut False, not True;"),
    ],
)
def test_retest_refuses_detections_of_other_options(call, trained, capsys, option, told):
    assert call("--test", trained, *option) == 0
    assert call("--test", trained, *option, "--retest") == 0
    assert call("--test", trained, "--retest") == 0
    assert call("--test", trained) == 0
    assert call("--test", trained, *option, "--retest") == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_test_that_ends_early_leaves_no_scores_of_other_detections(call, trained, monkeypatch):
    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    assert {"results.json", "curves.npz"} <= {path.name for path in folder.iterdir()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_test, "score", interrupted)
    assert call("--test", trained, "--nms", "soft") == 130
    assert not {"results.json", "curves.npz"} & {path.name for path in folder.iterdir()}


def test_a_backend_is_for_coco(call, trained, capsys):
    assert call("--test", trained, "--eval-backend", "hotcoco") == 2
    assert "--eval-backend goes with -d COCO" in capsys.readouterr().err


def test_weights_that_diverged_are_told(call, trained, capsys):
    saved = torch.load(trained, weights_only=True)
    saved["model"]["conf.0.bias"][0] = torch.nan
    torch.save(saved, trained)
    assert call("--test", trained) == 2
    assert "output is not finite (conf contains NaN or +infinity)" in capsys.readouterr().err


def test_retest_refuses_detections_of_other_weights(call, trained, capsys):
    assert call("--test", trained) == 0
    saved = torch.load(trained, weights_only=True)
    saved["model"]["loc.0.bias"] += 1
    torch.save(saved, trained)
    assert call("--test", trained, "--retest") == 2
    assert "sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-v", "SSD_vgg"), ("SSD_vgg", "tiny")),
        (("-s", "512"), ("512", "300")),
        (
            ("-d", "COCO"),
            ("COCO", "instances_val2017.json"),
        ),  # data to test on, which are not there
        (("--classes", "a,b"), ("not learnt a, b", "cell, platelet, rod")),
        (("--basenet", "x.pth"), ("--basenet is for training",)),
        (("--resume", "auto"), ("--resume is for training",)),
    ],
)
def test_option_that_contradicts_the_checkpoint_is_refused_with_both_values(
    call, trained, options, words, capsys
):
    assert call("--test", trained, *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def published(tmp_path, num_classes, prefix="module."):
    net = build_net("tiny", 300, num_classes)
    path = tmp_path / "published.pth"
    torch.save({prefix + k: t for k, t in net.state_dict().items()}, path)
    return path


def test_a_published_file_with_21_classes_is_tested_as_voc(call, tmp_path, voc_devkit):
    path = published(tmp_path, 21)
    assert call("--test", path, "--root", voc_devkit) == 0
    found = list((call.folder / "published").glob("ss_predict/*/2007_test/results.json"))
    assert len(json.loads(found[0].read_text())["per_class"]) == 20


def test_a_published_file_with_81_classes_is_coco(call, tmp_path, capsys):
    assert call("--test", published(tmp_path, 81), "--root", tmp_path / "nothing") == 2
    assert "instances_val2017.json" in capsys.readouterr().err


def test_a_published_file_with_own_classes_asks_for_their_names(call, tmp_path, voc_folder, capsys):
    path = published(tmp_path, 4)
    assert call("--test", path, "--root", voc_folder) == 2
    assert "3 classes and no names" in capsys.readouterr().err
    names = ("--classes", "cell,platelet,rod")
    assert call("--test", path, "--root", voc_folder, "-d", "VOC", *names) == 0
    assert call("--test", path, "--root", voc_folder, "-d", "VOC", "--classes", "cell,rod") == 2
    assert "3 classes" in capsys.readouterr().err


# ---------------------------------------------------------------- options and mistakes


def test_options_come_from_the_line_then_the_checkpoint_then_the_defaults(tmp_path):
    stored = {"version": "tiny", "size": 300, "dataset": "VOC", "lr": 0.5, "seed": 3, "date": "x"}
    options = resolve({"lr": 0.1, "root": str(tmp_path)}, stored)
    assert (options["lr"], options["seed"], options["momentum"]) == (0.1, 3, 0.9)
    assert "date" not in options
    assert options["max_epoch"] == 300
    coco = resolve({"dataset": "COCO"})
    assert (coco["max_epoch"], coco["weight_decay"]) == (150, 1e-4)
    assert coco["root"] == str(Path.home() / "data" / "COCO")
    assert coco["train_sets"] == [["2017", "train"]]


def test_image_sets_follow_the_kind_of_root(tmp_path, voc_folder):
    assert resolve({"root": str(voc_folder)})["test_sets"] == [[None, "test"]]
    assert resolve({"root": str(tmp_path)})["train_sets"] == [
        ["2007", "trainval"], ["2012", "trainval"],
    ]  # fmt: skip
    given = {"root": str(tmp_path), "train_sets": "2012_train, 2007_trainval,own_set"}
    assert resolve(given)["train_sets"] == [
        ["2012", "train"], ["2007", "trainval"], [None, "own_set"],
    ]  # fmt: skip


def test_published_spellings_are_accepted():
    line = (
        "-v SSD_HarDNet85 -s 512 -d COCO -b 16 --learning-rate 0.001 -max 7 -we 2 --cuda false "
        "--ngpu 1 --visdom true --send_images_to_visdom no --log_iters true --gamma 0.2 "
        "--save_frequency 5 --test_frequency 3 --jaccard_threshold 0.4 --retest false --date 0504"
    )
    line += " --eval_backend hotcoco"
    arguments = parser(
        versions=models.BACKBONES,
        sizes=(300, 512),
        datasets=("VOC", "COCO"),
        suppressions=("hard", "soft"),
        backends=("pycocotools", "hotcoco"),
    )
    options = vars(arguments.parse_args(line.split()))
    assert options == {
        "version": "SSD_HarDNet85", "size": 512, "dataset": "COCO", "batch_size": 16, "lr": 1e-3,
        "max_epoch": 7, "warm_epoch": 2, "cuda": False, "ngpu": 1, "visdom": True,
        "send_images_to_visdom": False, "log_iters": 10, "gamma": 0.2, "save_frequency": 5,
        "test_frequency": 3, "jaccard_threshold": 0.4, "retest": False, "date": "0504",
        "eval_backend": "hotcoco",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--root", "/nowhere"], ["/nowhere"]),
        (["--test_sets", "tset"], ["tset", "test, trainval"]),
        (["--classes", "person"], ["person", "cell, platelet, rod"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--device", "tpuu"], ["tpuu", "auto, cpu, cuda"]),
        (["--cuda", "true", "--device", "cpu"], ["--cuda True", "--device cpu"]),
        (["--amp", "fp16"], ["fp16", "bf16"]),
        (["--ngpu", "3"], ["--ngpu 3"]),
        (["--basenet", "gone.pth"], ["gone.pth", "tiny.pth", "weights/README.md"]),
        (["--basenet", "a.pth", "--resume_net", "b.pth"], ["--basenet and --resume_net"]),
        (["--score_threshold", "0.5"], ["--test"]),
        (["--score_threshold", "0"], ["--test"]),
        (["--nms", "soft"], ["--nms", "--test"]),
        (["--class_agnostic"], ["--class_agnostic", "--test"]),
        (["--max_detections", "10"], ["--max_detections", "--test"]),
        (["--background_shortcut"], ["--background_shortcut", "--test"]),
        (["--eval-backend", "hotcoco"], ["--eval-backend", "-d VOC"]),
        (["--classes", ",".join(f"name{i}" for i in range(300))], ["name299", "cell"]),
        (["--save_folder", "/dev/null/x"], ["/dev/null"]),
        (["--device", "cpu:1"], ["cpu:1"]),
        (["--resume", "gone.pth"], ["gone.pth"]),
        (["--resume_net", "gone.pth"], ["gone.pth"]),
        (["--resume_epoch", "3"], ["--resume_net"]),
        (["--class_map", "a=b"], ["--class_map", "--resume_net"]),
        (["--crowds", "false"], ["--crowds", "-d COCO"]),
        (["--retest"], ["--test"]),
        (["--train_sets", ","], ["names no image set"]),
    ],
)
def test_a_users_mistake_is_one_sentence_and_status_2(call, options, words, capsys):
    assert call("--max_iters", 1, *options) == 2
    error = capsys.readouterr().err
    assert not call.folder.exists(), "a mistake leaves no run behind"
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "options",
    [["-v", "SSD_resnet"], ["-s", "400"], ["-b", "0"], ["--lr", "nan"], ["--lr", "-1"],
     ["--seed", "x"], ["--cuda", "maybe"], ["--jaccard_threshold", "1.5"], ["--unknown"]],
)  # fmt: skip
def test_value_that_cannot_be_is_refused_by_the_parser(options, capsys):
    with pytest.raises(SystemExit) as exit:
        main(options)
    assert exit.value.code == 2
    assert options[-1].lstrip("-") in capsys.readouterr().err


def test_a_run_is_never_overwritten(call, capsys):
    assert call("--max_iters", 1, "--date", "a", "--test_frequency", 0) == 0
    assert call("--max_iters", 1, "--date", "a", "--test_frequency", 0) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_resume_refuses_what_would_change_the_order_of_the_data(call, capsys):
    assert call("--max_iters", 1, "--date", "a", "--test_frequency", 0) == 0
    assert call("--resume", "auto", "-b", 3) == 2
    assert "--batch_size 3" in capsys.readouterr().err


def test_resume_refuses_other_pictures(call, voc_folder, capsys):
    assert call("--max_iters", 1, "--date", "a", "--test_frequency", 0) == 0
    split = voc_folder / "ImageSets" / "Main" / "trainval.txt"
    split.write_text(split.read_text().replace("b3\n", ""))
    assert call("--resume", "auto") == 2
    error = capsys.readouterr().err
    assert "6 images" in error
    assert "now (5)" in error


def test_options_given_anew_on_resume_are_in_force(call):
    assert call("-max", 2, "--date", "a", "--test_frequency", 0, "--max_iters", 1) == 0
    assert call("--resume", "auto", "--weight_decay", 0, "--momentum", 0.5) == 0
    (group,) = load_checkpoint(call.folder / "a" / "last.pth")["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0, 0.5)


def test_older_checkpoint_goes_on_beside_its_run_not_over_it(call, capsys):
    options = ("-max", 3, "--date", "a", "--test_frequency", 0, "--save_frequency", 1)
    assert call(*options) == 0
    older = call.folder / "a" / "tiny_VOC_epoches_1.pth"
    assert call("--resume", older) == 2
    assert "at step 3" in capsys.readouterr().err
    assert call("--resume", older, "--date", "b") == 0
    assert_same_run(call.folder / "a", call.folder / "b")


def test_runs_of_the_same_second_get_folders_of_their_own(call, monkeypatch):
    monkeypatch.setattr(train_test.time, "strftime", lambda _: "20260101-000000")
    for _ in range(2):
        assert call("--max_iters", 1, "--test_frequency", 0) == 0
    names = sorted(p.name for p in call.folder.iterdir())
    assert names == ["20260101-000000", "20260101-000000-2"]


def test_evaluation_that_is_interrupted_is_made_up_for(call, monkeypatch):
    options = ("-max", 2, "--test_frequency", 1)
    assert call(*options, "--date", "straight") == 0
    detect_all = train_test.detect_all

    def interrupted(*_):
        monkeypatch.setattr(train_test, "detect_all", detect_all)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return detect_all(*_)

    monkeypatch.setattr(train_test, "detect_all", interrupted)
    assert call(*options, "--date", "broken") == 130
    assert call("--resume", "auto", "--date", "broken") == 0
    assert_same_run(call.folder / "straight", call.folder / "broken")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": None}, "configuration"),
        ({"classes": "cell"}, "classes"),
        ({"config": {"size": 400}}, "size 400"),
        ({"config": {"lr": "fast"}}, "lr 'fast'"),
        ({"config": {"version": "SSD_other"}}, "version 'SSD_other'"),
        ({"step": "x"}, "resumed from"),
        ({"rng": {}}, "resumed from"),
        ({"optimizer": {}}, "resumed from"),
    ],
)
def test_checkpoint_with_a_field_that_cannot_be_is_refused(call, trained, change, words, capsys):
    saved = torch.load(trained, weights_only=True)
    for key, value in change.items():
        saved[key] = {**saved[key], **value} if key == "config" and value else value
    torch.save(saved, trained.parent / "last.pth")
    assert call("--resume", trained.parent / "last.pth", version="tiny") == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_checkpoint_of_another_program_is_refused(call, tmp_path, capsys):
    state = {"model": build_net("tiny", 300, 4).state_dict(), "optimizer": {}, "iteration": 3}
    torch.save(state, tmp_path / "other.pth")
    assert call("--resume", tmp_path / "other.pth") == 2
    assert "configuration" in capsys.readouterr().err


def test_precision_of_the_training_machine_is_not_that_of_the_test(call, trained):
    saved = torch.load(trained, weights_only=True)
    saved["config"] |= {"amp": "fp16", "ngpu": 4}
    torch.save(saved, trained)
    assert call("--test", trained) == 0


def test_results_lie_in_the_run_of_their_checkpoint_wherever_that_is(call, trained, tmp_path):
    import shutil

    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(trained.parent, moved)
    assert main(["--test", str(moved / trained.name), "--num_workers", "0"]) == 0
    assert (moved / "ss_predict" / trained.stem / "test" / "results.json").is_file()


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for words in ("SSD_HarDNet68", "(default: 4e-3; modern: 1e-3)", "Own data in VOC layout"):
        assert words in text


def test_coco_trains_and_is_scored(call, coco_folder, monkeypatch, capsys):
    pytest.importorskip("hotcoco")
    common = ["--save_folder", str(call.folder.parent), "--device", "cpu", "--num_workers", "0"]
    options = ["-d", "COCO", "-v", "tiny", "-s", "300", "--root", str(coco_folder), "-b", "2",
               "-max", "1", "--date", "coco", "--eval-backend", "hotcoco", *common]  # fmt: skip
    assert main(options) == 0
    run = call.folder / "coco"
    results = json.loads((run / "ss_predict" / "final" / "2017_val" / "results.json").read_text())
    assert len(results["stats"]) == 12
    assert results["backend"].startswith("hotcoco 1.")

    checkpoint = run / "Final_tiny_COCO.pth"
    path = run / "ss_predict" / checkpoint.stem / "2017_val" / "results.json"
    found = []
    for backend in ((), ("--eval-backend", "hotcoco"), ("--eval-backend", "faster-coco-eval")):
        assert main(["--test", str(checkpoint), *common, *backend]) == 0
        found.append(json.loads(path.read_text()))
    assert [report["backend"].split()[0] for report in found] == [
        "pycocotools", "hotcoco", "faster-coco-eval",
    ]  # fmt: skip
    assert found[0]["stats"] == found[1]["stats"] == pytest.approx(found[2]["stats"], abs=1e-14)

    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(train_test, "detect", None)
    assert main(["--test", str(checkpoint), *common, "--eval-backend", "hotcoco"]) == 2
    assert "pip install" in capsys.readouterr().err


# ---------------------------------------------------------------- transfer


@pytest.fixture
def coco_file(tmp_path):
    """A published file of 81 classes, in which row k of a box's conf weights is filled with k."""
    net = build_net("tiny", 300, 81)
    for layer in net.conf:
        rows = torch.arange(81.0).repeat(layer.out_channels // 81)
        with torch.no_grad():
            layer.weight[:] = rows[:, None, None, None]
            layer.bias[:] = -rows
    torch.save(net.state_dict(), tmp_path / "coco.pth")
    return tmp_path / "coco.pth"


VOC_ROWS = [0, 5, 2, 15, 9, 40, 6, 3, 16, 57, 20, 61, 17, 18, 4, 1, 59, 19, 58, 7, 63]


@pytest.fixture
def detecting(monkeypatch):
    """Records networks and prior boxes that are to detect; nothing is detected."""
    seen = []

    def detect(net, dataset, priors, *_):
        seen.append((net, priors))
        none = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, np.int64)}
        return [none] * len(dataset)

    monkeypatch.setattr(train_test, "detect", detect)
    return seen


def test_a_coco_detector_is_tested_on_voc_by_its_21_rows(call, coco_file, voc_devkit, detecting):
    assert call("--test", coco_file, "-d", "VOC", "--root", voc_devkit) == 0
    ((net, priors),) = detecting
    for layer in net.conf:
        rows = torch.tensor(VOC_ROWS).repeat(layer.out_channels // 21)
        assert torch.equal(layer.weight[:, 0, 0, 0], rows.float())
        assert torch.equal(layer.bias, -rows.float())
    assert torch.equal(priors, PriorBox(COCO_300)())


def test_a_coco_detector_is_tuned_on_voc_and_keeps_its_boxes(
    call, coco_file, voc_devkit, detecting, capsys
):
    options = ("--root", voc_devkit, "--resume_net", coco_file, "--lr", 0, "--date", "tuned")
    assert call(*options, "-d", "VOC", "-max", 1, "--max_iters", 1, "--test_frequency", 0) == 0
    assert "20 of 20 classes by name" in capsys.readouterr().out
    checkpoint = call.folder / "tuned" / "last.pth"
    assert load_checkpoint(checkpoint)["config"]["priors"] == "COCO"
    assert call("--test", checkpoint) == 0
    ((net, priors),) = detecting
    # The warm-up's first step is of 1e-6.
    assert net.conf[0].weight[:21, 0, 0, 0].tolist() == pytest.approx(VOC_ROWS, abs=1e-3)
    assert torch.equal(priors, PriorBox(COCO_300)())


def test_own_classes_start_from_coco_by_a_map_and_others_new(call, coco_file, detecting, capsys):
    options = ("--resume_net", coco_file, "--lr", 0, "--date", "own", "--max_iters", 1)
    assert call(*options, "--class_map", "rod=baseball bat", "--test_frequency", 0) == 0
    assert "1 of 3 classes by name; new: cell, platelet" in capsys.readouterr().out
    weight = weights(call.folder / "own" / "last.pth")["conf.0.weight"]
    assert weight[[0, 3], 0, 0, 0].tolist() == pytest.approx([0, 35], abs=1e-3)
    assert 0 < weight[1:3].abs().max() < 1


def test_classes_that_a_checkpoint_has_not_learnt_are_named(
    call, coco_file, voc_folder, detecting, capsys
):
    test = ("--test", coco_file, "-d", "VOC", "--root", voc_folder)
    assert call(*test) == 2
    assert "has not learnt cell, platelet, rod" in capsys.readouterr().err
    everything = "cell=person,platelet=bicycle,rod=toothbrush"
    assert call(*test, "--class_map", everything) == 0
    ((net, _),) = detecting
    assert net.conf[0].weight[:4, 0, 0, 0].tolist() == [0, 1, 2, 80]
    assert call(*test, "--class_map", everything, "--retest") == 0
    assert call(*test, "--class_map", everything.replace("bicycle", "cat"), "--retest") == 2
    assert "class_map" in capsys.readouterr().err


def test_own_coco_categories_are_tested_and_tuned_from_a_published_file(
    call, coco_file, coco_folder, detecting, capsys
):
    for path in (coco_folder / "annotations").iterdir():
        text = path.read_text().replace('"thing"', '"zebra"').replace('"other"', '"person"')
        path.write_text(text)
    names = ["zebra", "person"]
    rows = [0, 1 + COCO_CLASSES.index("zebra"), 1]
    root = ("--root", coco_folder)
    for more in ((), ("-d", "COCO"), ("--classes", ",".join(names))):
        assert call("--test", coco_file, *root, *more) == 0
        net, priors = detecting.pop()
        assert net.conf[0].weight[: len(rows), 0, 0, 0].tolist() == rows
        assert torch.equal(priors, PriorBox(COCO_300)())
    swapped = ("--class_map", f"{names[0]}=toothbrush")
    assert call("--test", coco_file, *root, *swapped) == 0
    assert detecting.pop()[0].conf[0].weight[1, 0, 0, 0] == 80

    start = ("-d", "COCO", *root, "--resume_net", coco_file, "--max_iters", 1, "--date", "own")
    assert call(*start, "--crowds", "false", "--test_frequency", 0) == 0
    assert f"{len(names)} of {len(names)} classes by name" in capsys.readouterr().out
    checkpoint = call.folder / "own" / "last.pth"
    assert load_checkpoint(checkpoint)["config"]["crowds"] is False
    # The run's own data are still known beside a map.
    assert call("--test", checkpoint, *swapped) == 2
    assert "toothbrush is none of the classes" in capsys.readouterr().err


def test_prior_boxes_of_a_file_without_names_are_those_of_the_data(call, tmp_path, coco_folder):
    torch.save(build_net("tiny", 300, 4).state_dict(), tmp_path / "three.pth")
    torch.save(build_net("tiny", 300, 3).state_dict(), tmp_path / "own.pth")
    start = ("-d", "COCO", "--root", coco_folder, "--max_iters", 1, "--test_frequency", 0)
    assert call(*start, "--resume_net", tmp_path / "own.pth", "--date", "a") == 0
    assert load_checkpoint(call.folder / "a" / "last.pth")["config"]["priors"] == "COCO"
    assert call(*start, "--resume_net", tmp_path / "three.pth", "--date", "b") == 2
