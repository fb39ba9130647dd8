"""Training on small data sets, end to end, with a network small enough for a test."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from program import assert_same_run, locked_elsewhere
from tiny import TINY

import engine.evaluate
import engine.folder
import engine.run
import models
import train_test
from data import DATASETS, transforms
from data.config import VOC_300
from data.loading import TrainingSet, WorkerDied
from engine.options import Call, Options
from engine.run import open_run
from engine.start import _base_file
from engine.trainer import Trainer
from inference.predictor import Predictor
from models import build_net
from train_test import main
from utils.checkpoint import load_checkpoint, sha256_of

pytestmark = pytest.mark.usefixtures("tiny")


def weights(path):
    return load_checkpoint(path)["model"]


def test_a_run_leaves_checkpoints_log_configuration_and_scores(call, capsys):
    assert call("-max", 4, "--date", "a", "--save_frequency", 2, "--test_frequency", 2) == 0
    run = call.folder / "a"
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "tiny_VOC_epoches_2.pth", "tiny_VOC_epoches_4.pth", "Final_tiny_VOC.pth", "last.pth",
        "train.log", "log.jsonl", "config.json", "ss_predict",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".part")]
    said = capsys.readouterr().out  # ends with the place of each file
    for name in ("Final_tiny_VOC.pth", "best.pth", "last.pth", "train.log", "log.jsonl"):
        assert name in names and str(run / name) in said
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


def test_a_run_that_another_process_trains_is_left_alone(call, capsys):
    assert call("-max", 2, "--date", "a", "--max_iters", 1, "--test_frequency", 0) == 0
    before = (call.folder / "a" / "last.pth").read_bytes()
    with locked_elsewhere(call.folder / "a" / ".lock"):
        assert call("--resume", "auto", "--date", "a") == 2
    assert "another process" in capsys.readouterr().err
    assert (call.folder / "a" / "last.pth").read_bytes() == before
    assert call("--resume", "auto", "--date", "a") == 0


@pytest.mark.parametrize("resumed, words", [
    ("last.pth", "repeat the command"), ("tiny_VOC_epoches_1.pth", "repeat the command"),
    ("auto", "--resume auto"), ("", "--resume auto"),
])
def test_a_run_that_goes_on_while_another_process_reads_it_is_left_alone(
    resumed, words, call, monkeypatch, capsys
):
    folder, options = call.folder / "a", ["-max", 2, "--date", "a", "--test_frequency", 0]
    if resumed.endswith(".pth"):
        assert call(*options, "--save_frequency", 1, "--max_iters", 3) == 0
        resumed, words = folder / resumed, f"step 5 now.*{words}"

    def read(*args):
        run = open_run(*args)
        monkeypatch.setattr(train_test, "open_run", open_run)
        assert call(*options, "--resume", "auto", "--max_iters", 5) == 0
        return run

    monkeypatch.setattr(train_test, "open_run", read)
    assert call(*options, *["--resume", resumed] * bool(resumed)) == 2
    assert re.search(f"{folder}.*{words}", capsys.readouterr().err)
    assert load_checkpoint(folder / "last.pth")["step"] == 5


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


def test_a_data_set_smaller_than_a_batch_trains(call, make_voc, tmp_path, capsys):
    sets = {"trainval": {"a": [("x", (5, 5, 40, 40))]}, "test": {"b": [("x", (9, 9, 50, 60))]}}
    folder = make_voc(tmp_path / "one", sets)
    sets = ("--train_sets", "trainval", "--test_sets", "trainval")
    assert call("-max", 1, "--date", "a", "-b", 32, *sets, root=folder) == 0
    said = capsys.readouterr()
    said = said.out + said.err
    assert "--batch_size 32 is lowered to 1" in said and "(--amp off)" in said
    assert "1 of 1 test images are training images" in said and "a.jpg" in said


def test_devkit_trains_on_both_years_and_is_scored_by_the_11_point_metric(call, voc_devkit):
    assert call("-max", 1, "--date", "a", root=voc_devkit) == 0
    results = call.folder / "a" / "ss_predict" / "final" / "2007_test" / "results.json"
    assert json.loads(results.read_text())["metric"] == "VOC07 11-point AP@.5"
    assert len(load_checkpoint(call.folder / "a" / "last.pth")["classes"]) == 20


def test_weights_of_a_whole_detector_start_a_new_run(call, capsys):
    assert call("-max", 1, "--date", "a", "--test_frequency", 0) == 0
    path = call.folder / "a" / "Final_tiny_VOC.pth"
    # One command begins a run from the file, not from another run, and goes on with it.
    runs = {*call.folder.iterdir()}
    for epochs in (1, 2):
        options = ("--resume_net", path, "--resume", "auto", "-max", epochs)
        assert call(*options, "--test_frequency", 0) == 0
    (new,) = {*call.folder.iterdir()} - runs
    last = load_checkpoint(new / "last.pth")
    assert last["step"] == 6 and "all weights from" in last["config"]["start"]
    options = ("--resume_net", path, "--resume_epoch", 2, "-max", 3, "--date", "b", "--lr", 0)
    assert call(*options) == 0
    new = load_checkpoint(call.folder / "b" / "Final_tiny_VOC.pth")
    assert new["step"] == 9
    assert "all weights from" in new["config"]["start"]
    assert json.loads((call.folder / "b" / "config.json").read_text()) == new["config"]
    for key, tensor in weights(path).items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(tensor, new["model"][key])
    assert call("--resume_net", path, "-v", "SSD_HarDNet68", "--date", "c") == 2
    assert "SSD_HarDNet68 contradicts the checkpoint, which is made for tiny" in (
        capsys.readouterr().err)


def test_a_run_names_the_bytes_that_it_started_from(call, trained, monkeypatch):
    before, open_dataset = sha256_of(trained), engine.run.open_dataset

    def replaced(*args):
        trained.write_bytes(b"new")
        return open_dataset(*args)

    monkeypatch.setattr(engine.run, "open_dataset", replaced)
    options = ("--resume_net", trained, "--max_iters", 1, "--test_frequency", 0, "--date", "b")
    assert call(*options) == 0
    assert before in load_checkpoint(call.folder / "b" / "last.pth")["config"]["start"]


def test_random_weights_that_freeze_are_told(call, capsys):
    step = ("--max_iters", 1, "--test_frequency", 0, "--classes")
    assert call("--freeze", "base", *step, "rod,cell") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--freeze base", "--resume_net FILE", "--basenet FILE"))
    heads = ("--resume_net", next(call.folder.glob("*/last.pth")), "--freeze", "heads", *step)
    assert call(*heads, "cell,rod") == 0
    assert "--freeze heads" not in capsys.readouterr().out
    assert call(*heads, "cell,rod,platelet") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--freeze heads", "weights of platelet;", "--class_map"))


def test_base_weights_are_counted_in_the_log(call, tmp_path, capsys):
    base = build_net("tiny", 300, 2).base
    torch.save({f"module.{k}": t for k, t in base.state_dict().items()}, tmp_path / "base.pth")
    assert call("--basenet", tmp_path / "base.pth", "--max_iters", 1, "--test_frequency", 0) == 0
    assert "9 of 9 tensors of the base network from" in capsys.readouterr().out


def test_published_base_weights_are_taken_where_they_are(tmp_path, monkeypatch, caplog):
    """Without them the log names the file, the command that gets it, and the recipe."""
    monkeypatch.chdir(tmp_path)
    options = Options(version="RFB_HarDNet68")
    assert _base_file(Call(), options) is None
    (record,) = caplog.records
    for text in ("hardnet68_base_bridge.pth", "tools.weights download hardnet68-base", "modern"):
        assert text in record.getMessage()
    Path("weights").mkdir()
    for name in ("hardnet68.pth", "hardnet68_base_bridge.pth"):
        Path("weights", name).touch()
        assert _base_file(Call(), options) == Path("weights", name)
    assert _base_file(Call(basenet="other.pth"), options) == Path("other.pth")
    assert _base_file(Call(basenet="none"), options) is None and len(caplog.records) == 1


def test_tensorboard_gets_scalars_and_pictures_with_their_boxes(call):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--visdom", "--send_images_to_visdom", "-max", 1, "--test_frequency", 1)
    assert call(*options, "--date", "a") == 0
    events = EventAccumulator(str(call.folder / "a" / "tensorboard")).Reload()
    scalars = {"loss", "loss_loc", "loss_conf", "lr", "images_per_second", "waiting_for_data"}
    assert scalars | {"VOC area AP@.5"} == set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert set(events.Tags()["images"]) == {"training images", "detections"}
    (picture,) = events.Images("training images")
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


def test_a_run_is_never_overwritten_and_goes_on_with_its_options_and_images_alone(
    call, voc_folder, capsys
):
    assert call("-max", 2, "--date", "a", "--max_iters", 1, "--test_frequency", 0) == 0
    path, split = call.folder / "a" / "last.pth", voc_folder / "ImageSets/Main/trainval.txt"
    before, images = path.read_bytes(), split.read_text()
    kinds = ("--recipe modern", "--ema 0.5", "--overfit 2", "--dataset COCO")
    refused = {"": "holds a run already"}
    refused |= {f"--resume auto {kind}": f"{kind} contradicts" for kind in kinds}
    for line, words in refused.items():
        assert call("--date", "a", *line.split()) == 2
        assert words in capsys.readouterr().err
    split.write_text(images.replace("b3\n", ""))
    assert call("--resume", "auto") == 2
    error = capsys.readouterr().err
    assert "last.pth" in error and str(voc_folder) in error and "6 and 5" in error
    assert path.read_bytes() == before
    split.write_text(images)
    assert call("--resume", "auto", "--weight_decay", 0, "--momentum", 0.5) == 0
    (group,) = load_checkpoint(path)["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0, 0.5)


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
    assert "5 of 6" in capsys.readouterr().err


def test_without_expansion_no_training_image_is_shrunk(call, monkeypatch):
    framed, resize = [], transforms.resize

    def note(image, boxes, canvas, *rest):
        framed.append(canvas != (image.shape[1], image.shape[0], 0, 0))
        return resize(image, boxes, canvas, *rest)

    monkeypatch.setattr(transforms, "resize", note)
    for share in (1, 0):
        framed.clear()
        assert call("-max", 3, "--test_frequency", 0, "--expansion", share) == 0
        assert any(framed) == bool(share) and framed


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
    assert "a step: 2 images in all (1 processes x 2 accumulation steps x 1)" in said
    assert call("--accumulate", 3) == 2
    assert "give a multiple of 3" in capsys.readouterr().err


def test_training_through_the_compiler_gives_the_same_losses(call):
    for name, options in (("eager", ()), ("compiled", ("--compile",))):
        assert call("-max", 1, "--date", name, "--lr", 1e-5, "--test_frequency", 0, *options) == 0
    records = [json.loads((call.folder / name / "log.jsonl").read_text())
               for name in ("eager", "compiled")]
    assert records[0]["loss_conf"] == pytest.approx(records[1]["loss_conf"], rel=1e-4)
    saved = load_checkpoint(call.folder / "compiled" / "last.pth")
    assert set(saved["model"]) == set(weights(call.folder / "eager" / "last.pth"))


def test_older_checkpoint_goes_on_beside_its_run_not_over_it(call, capsys):
    options = ("-max", 3, "--date", "a", "--test_frequency", 0, "--save_frequency", 1)
    assert call(*options) == 0
    older = call.folder / "a" / "tiny_VOC_epoches_1.pth"
    assert call("--resume", older) == 2
    assert "at step 3" in capsys.readouterr().err
    assert call("--resume", older, "--date", "b") == 0
    assert_same_run(call.folder / "a", call.folder / "b")
    (call.folder / "a" / "last.pth").write_bytes(b"cut")
    assert call("--resume", older) == 0
    assert_same_run(call.folder / "b", call.folder / "a")


def test_the_first_checkpoint_of_a_run_is_one_to_resume(call, monkeypatch):
    written = []

    def killed(path, *_):
        written.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.folder, "save_checkpoint", killed)
    for more in (("--save_frequency", 1), ("--max_iters", 1)):
        assert call("-max", 2, "--test_frequency", 0, *more) == 130
    assert {*written} == {"last.pth"}


def test_a_loading_process_that_the_signal_ended_too_is_no_error(call, monkeypatch):
    def ended(trainer, _):
        trainer.stop.asked_at = 0.0
        raise WorkerDied("a loading process died")

    monkeypatch.setattr(Trainer, "_train", ended)
    assert call("--date", "a") == 130
    assert (call.folder / "a" / "last.pth").is_file()


@pytest.mark.parametrize("change", ["sets", "annotations"])
def test_other_test_data_on_resume_have_a_best_of_their_own(change, call, voc_folder, monkeypatch):
    scores = iter([0.9, 0.5, 0.6])
    evaluate = engine.evaluate.Evaluation.__call__
    monkeypatch.setattr(engine.evaluate.Evaluation, "__call__", lambda *args: (
        evaluate(*args) | {"value": next(scores)}))
    first = "trainval" if change == "sets" else "test"
    assert call("-max", 1, "--test_frequency", 1, "--date", "a", "--test_sets", first) == 0
    if change == "annotations":
        name = (voc_folder / "ImageSets/Main/test.txt").read_text().split()[0]
        path = voc_folder / f"Annotations/{name}.xml"
        text = path.read_text()
        path.write_text(re.sub(r"<xmin>(\d+)", lambda match: f"<xmin>{int(match[1]) + 1}", text))
        assert path.read_text() != text
    last = call.folder / "a" / "last.pth"
    assert call("--resume", last, "-max", 1, "--test_frequency", 0, "--max_iters", 3) == 0
    assert call("--resume", last, "-max", 3, "--test_frequency", 1, "--test_sets", "test") == 0
    assert load_checkpoint(last)["best"]["value"] == 0.6


def test_runs_of_the_same_second_get_folders_of_their_own(call, monkeypatch):
    monkeypatch.setattr(engine.run.time, "strftime", lambda _: "20260101-000000")
    for _ in range(2):
        assert call("--max_iters", 1, "--test_frequency", 0) == 0
    names = sorted(p.name for p in call.folder.iterdir())
    assert names == ["20260101-000000", "20260101-000000-2"]


def test_evaluation_that_is_interrupted_is_made_up_for(call, monkeypatch):
    options = ("-max", 2, "--test_frequency", 1)
    assert call(*options, "--date", "straight") == 0
    detect_all = engine.evaluate.detect_all

    def interrupted(*_):
        monkeypatch.setattr(engine.evaluate, "detect_all", detect_all)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return detect_all(*_)

    monkeypatch.setattr(engine.evaluate, "detect_all", interrupted)
    assert call(*options, "--date", "broken") == 130
    assert call("--resume", "auto", "--date", "broken") == 0
    assert_same_run(call.folder / "straight", call.folder / "broken")


def test_checkpoint_with_a_field_that_cannot_be_is_refused(call, trained, capsys):
    whole, path = torch.load(trained, weights_only=True), trained.parent / "last.pth"
    for change, words in (
        ({"config": None}, "configuration"), ({"classes": "cell"}, "classes"),
        ({"config": {"version": "SSD_other"}}, "SSD_other"), ({"step": "x"}, "resumed from"),
        ({"rng": {}}, "resumed from"), ({"optimizer": {}}, "resumed from"),
        ({"optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}, "momentum_buffer [2]"),
        ({"step": True}, "resumed from"), ({"totals": {"loss_loc": float("nan")}}, "nan"),
        ({"history": [{"step": [1]}]}, "[1]"), ({"data": [1]}, "resumed from"),
        ({"best": {"step": 1, "value": None, "metric": "AP"}}, "None"),
        ({"classes": [f"c{n}" for n in range(200_000)]}, "200000 classes"),
        ({"config": {"test_sets": [[None, "../../x"]]}}, "../../x"),
    ):
        saved = dict(whole)
        for key, value in change.items():
            merged = key in ("config", "optimizer", "totals") and value
            saved[key] = {**saved[key], **value} if merged else value
        torch.save(saved, path)
        assert call("--resume", path, version="tiny") == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_resume_auto_names_a_configuration_that_cannot_be_read(call, trained, capsys):
    file = trained.parent / "config.json"
    for content in (b"{", b"[" * 9999, b'{"dataset": "VOC"}', None):
        file.unlink() if content is None else file.write_bytes(content)
        assert call("--resume", "auto", "-max", 3) == 2
        error = capsys.readouterr().err
        assert str(file) in error and "give --resume" in error and error.count("\n") == 1
        assert [path.name for path in call.folder.iterdir()] == ["a"]


def test_a_checkpoint_from_elsewhere_does_not_say_where_to_write(trained, tmp_path, monkeypatch):
    saved = torch.load(trained, weights_only=True)
    saved["config"] |= {"save_folder": str(tmp_path / "out"), "cache": str(tmp_path / "out")}
    torch.save(saved, tmp_path / "c.pth")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["--resume", str(tmp_path / "c.pth"), "-max", "3", "--device", "cpu"]) == 0
    assert not (tmp_path / "out").exists() and list(Path("weights/tiny_300").glob("*/last.pth"))


@pytest.mark.parametrize(("options", "words"), [
    (["--root", "/nowhere"], ["/nowhere"]), (["--test_sets", "tset"], ["tset", "test, trainval"]),
    (["--classes", "person"], ["person", "cell, platelet, rod"]),
    (["--device", "cuda:99"], ["cuda:99", "--device cpu"]), (["--ngpu", "3"], ["--ngpu 3"]),
    (["--save_folder", "/dev/null/x"], ["/dev/null"]), (["--resume", "gone.pth"], ["gone.pth"]),
    (["--lr", "1", "--test_sets", ","], ["image set"]),
    (["--optimizer", "adamw", "--resume", "auto"], ["--optimizer adamw", "--lr"]),
])
def test_a_users_mistake_is_one_sentence_status_2_and_leaves_no_run(call, options, words, capsys):
    assert call("--max_iters", 1, *options) == 2
    error = capsys.readouterr().err
    assert not call.folder.exists()
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


# ---------------------------------------------------------------- kinds of data and presets


def test_evaluation_decodes_with_the_variance_that_the_loss_encodes_with(call, monkeypatch):
    boxes = dataclasses.replace(VOC_300, variance=(0.3, 0.4))
    row = dataclasses.replace(TINY, priors={("VOC", 300): boxes})
    monkeypatch.setitem(models.BACKBONES, "tiny", row)
    seen = []
    monkeypatch.setattr(Trainer, "run", lambda self, *_: seen.append(self))
    assert call("--date", "a") == 0
    (trainer,) = seen
    assert trainer.train_step.criterion.variance == trainer.evaluate.detect.variance == (0.3, 0.4)
    monkeypatch.undo()
    monkeypatch.setitem(models.BACKBONES, "tiny", row)
    assert call("-max", 1, "--date", "b") == 0
    kept = np.load(call.folder / "b" / "ss_predict" / "final" / "test" / "detections.npz")
    path = call.folder / "b" / "Final_tiny_VOC.pth"
    assert main(["--test", str(path), "--score_threshold", "0.01", "--device", "cpu"]) == 0
    again = np.load(path.parent / "ss_predict" / path.stem / "test" / "detections.npz")
    found = Predictor(path, score_threshold=0.01)(
        [trainer.evaluate.run.test_set.pull_image(i) for i in range(4)]
    )
    expected = torch.cat([each["boxes"] for each in found]).numpy()
    np.testing.assert_array_equal(kept["boxes"], again["boxes"])
    np.testing.assert_allclose(kept["boxes"], expected, rtol=1e-3, atol=1e-2)


def test_a_run_goes_on_after_its_data_were_moved(call, voc_folder):
    lists = voc_folder / "ImageSets" / "Main"
    shutil.copy(lists / "trainval.txt", lists / "2024_train.txt")
    options = ("-max", 2, "--train_sets", "2024_train", "--test_frequency", 0)
    assert call(*options, "--date", "a", "--max_iters", 2) == 0
    moved = voc_folder.rename(voc_folder.with_name("moved"))
    path = call.folder / "a" / "last.pth"
    assert main(["--resume", str(path), "--root", str(moved), "--device", "cpu"]) == 0
    saved = load_checkpoint(path)
    assert (saved["step"], saved["config"]["root"]) == (6, str(moved))
    assert saved["config"]["train_sets"] == [[None, "2024_train"]]


def test_a_third_data_set_is_a_row(call, monkeypatch, voc_folder):
    own = dataclasses.replace(DATASETS["VOC"], detection={"conf_thresh": 0.2}, epochs=1)
    monkeypatch.setitem(DATASETS, "MINE", own)
    assert call("-d", "MINE", "--date", "a", "--recipe", "modern", "--max_iters", 2) == 0
    path = call.folder / "a" / "Final_tiny_MINE.pth"
    assert load_checkpoint(path)["config"]["max_epoch"] == 1
    assert main(["--test", str(path), "--device", "cpu"]) == 0
    results = path.parent / "ss_predict" / path.stem / "test" / "results.json"
    assert json.loads(results.read_text())["thresholds"]["score"] == 0.2
