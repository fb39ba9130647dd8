"""Train and evaluate SSD detectors: the command line, and the wiring of its parts.

    python train_test.py -d VOC -v SSD_HarDNet68 -s 512                    # train
    python train_test.py --test weights/SSD_HarDNet68_512/.../Final_SSD_HarDNet68_VOC.pth

Exit status: 0 done, 1 unexpected failure, 2 bad usage or bad input, 130 interrupted (state saved).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import build_dataset
from data.config import (
    INPUT_MEAN,
    LR_MILESTONES,
    NMS_THRESHOLD,
    PER_CLASS,
    PRIORS,
    RECIPES,
    TRAINING_THRESHOLD,
    WARMUP_START_LR,
)
from data.detections import load_detections, save_detections
from data.loading import EpochSampler, TestSet, TrainingSet, test_loader, training_loader
from layers import Detect, MultiBoxLoss, PriorBox
from models import BACKBONES, SIZES, build_net, identify
from utils import nms
from utils.checkpoint import (
    load_base,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    sha256_of,
)
from utils.engine import AMP_TYPES, NonFiniteLoss, detect_all, train_steps
from utils.errors import UserError
from utils.logger import LOGGER, Progress, RunLog, close_logging, setup_logging
from utils.schedule import lr_at

DEFAULTS = {
    "version": "SSD_HarDNet68",
    "size": 512,
    "dataset": "VOC",
    "jaccard_threshold": 0.5,
    "batch_size": 32,
    "num_workers": 8,
    "ngpu": 1,
    "lr": 4e-3,
    "momentum": 0.9,
    "gamma": 0.1,
    "warm_epoch": 1,
    "log_iters": 10,
    "save_folder": "weights/",
    "save_frequency": 10,
    "test_frequency": 10,
    "visdom": False,
    "send_images_to_visdom": False,
    "retest": False,
    "amp": "off",
    "seed": 0,
}
"""Values of what the command line leaves out, where they do not depend on the data set."""

FIXED_BY_CHECKPOINT = ("version", "size", "dataset", "classes")
"""What a checkpoint was made for: a command line that says otherwise is refused."""

PER_INVOCATION = (
    "test",
    "retest",
    "resume",
    "resume_net",
    "resume_epoch",
    "max_iters",
    "device",
    "cuda",
    "basenet",
    "date",
    "save_folder",
    "score_threshold",
)
"""Options of one call, not of a run: a resumed run does not take them from its checkpoint."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state is to be saved."""


# ---------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The command line. Options that are not given are absent from the result, so that a
    checkpoint's configuration can fill them in before the defaults do."""
    p = argparse.ArgumentParser(
        description="Train an SSD detector (the default), or evaluate one (--test).",
        epilog="Own data in VOC layout: train_test.py -d VOC --root FOLDER -s 300. "
        "What a checkpoint knows (network, size, data set, classes) need not be repeated "
        "with --test or --resume.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    shown = {k: f" (default: {v})" for k, v in DEFAULTS.items()}

    what = p.add_argument_group("what")
    what.add_argument("-v", "--version", choices=BACKBONES, help="network" + shown["version"])
    what.add_argument(
        "-s", "--size", type=int, choices=SIZES, help="side of the input" + shown["size"]
    )
    what.add_argument(
        "-d",
        "--dataset",
        choices=RECIPES,
        help="layout of the data, and whose recipe" + shown["dataset"],
    )
    what.add_argument(
        "--root", metavar="DIR", help="where the data are (default: ~/data/VOCdevkit, ~/data/COCO)"
    )
    what.add_argument(
        "--classes",
        metavar="NAMES",
        help="a,b,c or a file with one name a line "
        "(default: what the data set declares, else what its annotations contain)",
    )
    what.add_argument(
        "--train_sets",
        metavar="SETS",
        help="e.g. 2007_trainval,2012_trainval, or "
        "trainval for a folder that itself holds Annotations/, JPEGImages/ and "
        "ImageSets/",
    )
    what.add_argument("--test_sets", metavar="SETS", help="e.g. 2007_test, or test")

    test = p.add_argument_group("testing")
    test.add_argument("--test", metavar="FILE", help="evaluate this checkpoint instead of training")
    test.add_argument(
        "--retest",
        type=boolean,
        nargs="?",
        const=True,
        help="score the detections of an earlier --test again",
    )
    test.add_argument(
        "--score_threshold",
        type=fraction,
        help="lowest score of a detection with --test (default: 0.03 VOC, 0.02 COCO)",
    )

    start = p.add_argument_group("where training starts")
    start.add_argument("--basenet", metavar="FILE", help="pretrained weights of the base network")
    start.add_argument(
        "--resume",
        metavar="FILE|auto",
        help="go on with a run from its checkpoint (auto: the newest run, or a new one)",
    )
    start.add_argument(
        "--resume_net", metavar="FILE", help="start a new run from the weights of a whole detector"
    )
    start.add_argument(
        "--resume_epoch",
        type=count,
        metavar="N",
        help="with --resume_net: the epoch at which the schedule starts (default: 0)",
    )

    recipe = p.add_argument_group("recipe")
    recipe.add_argument(
        "-b",
        "--batch_size",
        type=positive,
        metavar="N",
        help="pictures a step" + shown["batch_size"],
    )
    recipe.add_argument(
        "-max",
        "--max_epoch",
        type=positive,
        metavar="N",
        help="epochs (default: 300 VOC, 150 COCO)",
    )
    recipe.add_argument(
        "--max_iters",
        type=positive,
        metavar="N",
        help="stop after this many steps in all, e.g. to try things out",
    )
    recipe.add_argument(
        "--lr", "--learning-rate", type=number, help="initial learning rate" + shown["lr"]
    )
    recipe.add_argument("--momentum", type=number, help="of SGD" + shown["momentum"])
    recipe.add_argument("--weight_decay", type=number, help="(default: 5e-4 VOC, 1e-4 COCO)")
    recipe.add_argument(
        "--gamma",
        type=number,
        help="factor of the learning rate at 60, 80 and 90 %% of the epochs" + shown["gamma"],
    )
    recipe.add_argument(
        "-we",
        "--warm_epoch",
        type=count,
        metavar="N",
        help="epochs of linear warm-up" + shown["warm_epoch"],
    )
    recipe.add_argument(
        "--jaccard_threshold",
        type=fraction,
        help="least IoU of a positive prior box" + shown["jaccard_threshold"],
    )
    recipe.add_argument(
        "--seed", type=count, help="of weights, order and augmentation" + shown["seed"]
    )

    machine = p.add_argument_group("machine")
    machine.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    machine.add_argument(
        "--cuda",
        type=boolean,
        nargs="?",
        const=True,
        help="the same as --device cuda or, with 'false', --device cpu",
    )
    machine.add_argument(
        "--ngpu", type=positive, metavar="N", help="GPUs that share a batch" + shown["ngpu"]
    )
    machine.add_argument(
        "--num_workers",
        type=count,
        metavar="N",
        help="processes that load pictures" + shown["num_workers"],
    )
    machine.add_argument(
        "--amp",
        choices=AMP_TYPES,
        help="precision of the network; bf16 is "
        "about three times faster on CPUs that have it" + shown["amp"],
    )

    output = p.add_argument_group("output")
    output.add_argument(
        "--save_folder", metavar="DIR", help="where runs are kept" + shown["save_folder"]
    )
    output.add_argument("--date", metavar="NAME", help="name of the run (default: the time)")
    output.add_argument(
        "--save_frequency",
        type=count,
        metavar="N",
        help="epochs between kept checkpoints, 0: none" + shown["save_frequency"],
    )
    output.add_argument(
        "--test_frequency",
        type=count,
        metavar="N",
        help="epochs between evaluations, 0: none and no test set" + shown["test_frequency"],
    )
    output.add_argument(
        "--log_iters",
        type=steps_or_boolean,
        metavar="N",
        help="steps between log lines where there is no terminal, 0: none" + shown["log_iters"],
    )
    output.add_argument(
        "--visdom", type=boolean, nargs="?", const=True, help="live plots, written for TensorBoard"
    )
    output.add_argument(
        "--send_images_to_visdom",
        type=boolean,
        nargs="?",
        const=True,
        help="with --visdom: show training pictures, too",
    )
    return p


def boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def steps_or_boolean(text: str) -> int:
    """The published option was a boolean that meant every tenth iteration."""
    words = {"true": 10, "false": 0}
    return words[text.lower()] if text.lower() in words else count(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    if count(text) == 0:
        raise argparse.ArgumentTypeError("0 is too small, the least is 1")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def fraction(text: str) -> float:
    value = number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


# ---------------------------------------------------------------- options


def resolve(given: dict, stored: dict | None = None) -> dict:
    """All options of a call: what is ``given``, else what a checkpoint ``stored``, else defaults.

    Raises:
        UserError: given and stored contradict each other in what the checkpoint was made for.
    """
    stored = {k: v for k, v in (stored or {}).items() if k not in PER_INVOCATION}
    given = dict(given)
    if isinstance(given.get("classes"), str):
        given["classes"] = class_names(given["classes"])
    if "root" in given:
        given["root"] = str(Path(given["root"]).expanduser().absolute())
        if given["root"] != stored.get("root"):
            # Image sets of another root mean nothing here.
            stored = {k: v for k, v in stored.items() if k not in ("train_sets", "test_sets")}
    for key in FIXED_BY_CHECKPOINT:
        if key in given and key in stored and given[key] != stored[key]:
            raise UserError(
                f"--{key} {given[key]} contradicts the checkpoint, which is made for "
                f"{stored[key]}; leave the option out"
            )
    options = {**DEFAULTS, **stored, **given}
    recipe = RECIPES[options["dataset"]]
    options.setdefault("max_epoch", recipe.epochs)
    options.setdefault("weight_decay", recipe.weight_decay)
    folder = {"VOC": "VOCdevkit", "COCO": "COCO"}[options["dataset"]]
    options.setdefault("root", str(Path.home() / "data" / folder))
    bare = (Path(options["root"]) / "Annotations").is_dir()
    for key, bare_set in (("train_sets", "trainval"), ("test_sets", "test")):
        default = [(None, bare_set)] if bare else getattr(recipe, key)
        sets = options.get(key, default)
        options[key] = image_sets(sets) if isinstance(sets, str) else [list(s) for s in sets]
    return options


def image_sets(text: str) -> list[list[str | None]]:
    """ "2007_trainval,test" -> [["2007", "trainval"], [None, "test"]]."""
    sets = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        year, _, rest = name.partition("_")
        sets.append([year, rest] if year.isdecimal() and rest else [None, name])
    if not sets:
        raise UserError(f"{text!r} names no image set; give e.g. 2007_trainval,2012_trainval")
    return sets


def set_names(sets: list) -> str:
    return "+".join(f"{year}_{name}" if year else name for year, name in sets)


def class_names(text: str) -> list[str]:
    """ "a,b,c", or a file with one name a line."""
    is_file = Path(text).is_file()
    parts = Path(text).read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    names = [part.strip() for part in parts if part.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"--classes {text} names no class, or one twice")
    return names


def choose_device(given: dict) -> torch.device:
    name = given.get("device", "auto")
    if "cuda" in given:
        wanted = "cuda" if given["cuda"] else "cpu"
        if name not in ("auto", wanted) and not name.startswith(f"{wanted}:"):
            raise UserError(f"--cuda {given['cuda']} contradicts --device {name}; give one of them")
        name = wanted if name == "auto" else name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown; give auto, cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(
            f"--device {name} is not there: PyTorch {torch.__version__} sees {gpus} "
            "GPUs; use --device cpu"
        )
    return device


def check_amp(amp: str, device: torch.device) -> None:
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on a CPU")


# ---------------------------------------------------------------- evaluation


def evaluate(
    net: nn.Module,
    dataset,
    priors: torch.Tensor,
    options: dict,
    threshold: float,
    directory: Path,
    checkpoint: dict,
    on_batch=lambda images: None,
) -> dict:
    """Detect on ``dataset``, keep and score the detections in ``directory``; the results.

    ``checkpoint`` says what the weights are. With options["retest"] the detections kept in
    ``directory`` by an earlier call are scored again, if they are of the same checkpoint.
    """
    recipe = RECIPES[options["dataset"]]
    thresholds = {
        "score": threshold,
        "nms": NMS_THRESHOLD,
        "per_class": PER_CLASS,
        "per_image": recipe.top_k,
    }
    made_by = {
        "checkpoint": checkpoint,
        "sets": set_names(options["test_sets"]),
        "classes": list(dataset.classes),
        "thresholds": thresholds,
    }
    cache = directory / "detections.npz"
    directory.mkdir(parents=True, exist_ok=True)
    if options["retest"]:
        detections = load_detections(cache, dataset.ids, made_by)
    else:
        detect = Detect(threshold, NMS_THRESHOLD, PER_CLASS, recipe.top_k)
        batch_size = options["batch_size"]
        loader = test_loader(
            TestSet(dataset, _test_transform(options["size"])),
            batch_size,
            options["num_workers"],
            priors.device.type == "cuda",
        )
        progress = Progress("test", len(loader), options["log_iters"])

        def advance(images: int) -> None:
            progress.update(images)
            on_batch(images)

        try:
            detections = detect_all(
                net, detect, priors, loader, INPUT_MEAN, options["amp"], advance
            )
        finally:
            progress.close()
        save_detections(cache, dataset.ids, detections, made_by)
    results = {
        **dataset.evaluate(detections, directory),
        **made_by,
        "dataset": options["dataset"],
        "images": len(dataset),
        "detection_count": sum(len(d["scores"]) for d in detections),
        "amp": options["amp"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "nms": nms.backend(),
        },
    }
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def log_results(results: dict, directory: Path) -> None:
    for line in results["notes"]:
        LOGGER.info("  %s", line)
    for name, value in results["per_class"].items():
        LOGGER.info("  %-20s %.4f", name, value)
    value = results["value"]
    LOGGER.info(
        "%s: %s (%d pictures, %d detections of score > %g; %s)",
        results["metric"],
        "no ground truth to score against" if value is None else f"{value:.4f}",
        results["images"],
        results["detection_count"],
        results["thresholds"]["score"],
        directory / "results.json",
    )


def _test_transform(size: int):
    from data.transforms import TestTransform

    return TestTransform(size)


def open_dataset(options: dict, key: str, classes: list[str] | None):
    """The data set of options[key], and one line for each kind of record it had to change."""
    sets = [tuple(s) for s in options[key]]
    dataset = build_dataset(options["dataset"], options["root"], sets, classes)
    if classes is not None and list(dataset.classes) != list(classes):
        raise UserError(
            f"{options['root']} has the classes {', '.join(dataset.classes)}, but those in use "
            f"are {', '.join(classes)}; give the --root of matching data"
        )
    LOGGER.info("%s %s: %d pictures", options["root"], set_names(sets), len(dataset))
    for line in dataset.report():
        LOGGER.info("  %s", line)
    return dataset


# ---------------------------------------------------------------- testing


def test(given: dict) -> None:
    """Evaluate the checkpoint given["test"]."""
    for option in ("resume", "resume_net", "basenet"):
        if option in given:
            raise UserError(f"--{option} is for training, --test evaluates; give one of them")
    path = Path(given["test"])
    saved = load_checkpoint(path)
    options = resolve(given, describe(saved, path, given))
    device = choose_device(given)
    check_amp(options["amp"], device)
    classes = options.get("classes")
    dataset = open_dataset(options, "test_sets", classes)
    num_classes = len(dataset.classes) + 1
    net = build_net(options["version"], options["size"], num_classes)
    _load_net(net, saved["model"], path)
    net.to(device, memory_format=torch.channels_last)
    priors = PriorBox(PRIORS[options["dataset"], options["size"]]).to(device)()
    LOGGER.info(
        "%s at %d, %d classes, on %s; NMS: %s",
        options["version"],
        options["size"],
        num_classes - 1,
        device,
        nms.backend(),
    )
    folder = Path(options["save_folder"]) / f"{options['version']}_{options['size']}"
    # The run that the checkpoint lies in, so that its detections lie beside it.
    run = path.parent if path.parent.parent == folder else folder / path.stem
    run = folder / given["date"] if "date" in given else run
    directory = run / "ss_predict" / path.stem / set_names(options["test_sets"])
    results = evaluate(
        net,
        dataset,
        priors,
        options,
        given.get("score_threshold", RECIPES[options["dataset"]].test_threshold),
        directory,
        {"file": path.name, "sha256": sha256_of(path)},
    )
    log_results(results, directory)


def describe(saved: dict, path: Path, given: dict) -> dict:
    """What a checkpoint says of itself: its configuration, else what its tensors tell."""
    if "config" in saved:
        return {**saved["config"], "classes": saved["classes"]}
    try:
        version, size, num_classes = identify(saved["model"])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    stored = {"version": version, "size": size}
    named = len(class_names(given["classes"])) if "classes" in given else num_classes - 1
    if named != num_classes - 1:
        raise UserError(f"{path} has {num_classes - 1} classes, but --classes names {named}")
    # A published file: 81 classes are COCO's, 21 VOC's; own classes must be said.
    if num_classes == 81:
        stored["dataset"] = "COCO"
    elif num_classes == 21 and "classes" not in given:
        from data import VOC_CLASSES

        stored |= {"dataset": "VOC", "classes": list(VOC_CLASSES)}
    elif "classes" not in given:
        raise UserError(
            f"{path} has {num_classes - 1} classes and no names for them; give --classes"
        )
    return stored


def _load_net(net: nn.Module, state: dict, path: Path) -> None:
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise UserError(f"{path} does not fit the network: {reasons}") from error


# ---------------------------------------------------------------- training


def train(given: dict) -> None:
    """Train, from scratch or from where a checkpoint left off."""
    if "retest" in given:
        raise UserError("--retest scores the detections of a --test again; give --test, too")
    saved, run_dir = find_run(given)
    options = resolve(given, {**saved["config"], "classes": saved["classes"]} if saved else None)
    device = choose_device(given)
    check_amp(options["amp"], device)
    if saved:
        for key in ("batch_size", "seed", "train_sets"):
            if options[key] != saved["config"][key]:
                raise UserError(
                    f"--{key} {options[key]} contradicts the run that is resumed, "
                    f"which has {saved['config'][key]}; leave the option out"
                )
    elif any(run_dir.glob("*.pth")):
        raise UserError(
            f"{run_dir} holds a run already; give another --date, or --resume auto to go on with it"
        )
    if "resume_epoch" in given and "resume_net" not in given:
        raise UserError(
            "--resume_epoch goes with --resume_net FILE; to go on with a run of this "
            "program give --resume instead"
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if options["ngpu"] > max(gpus, 1):
        raise UserError(
            f"--ngpu {options['ngpu']} on {device}: PyTorch sees {gpus} GPUs; give fewer"
        )
    if options["visdom"]:
        _need_tensorboard()

    run_dir.mkdir(parents=True, exist_ok=True)
    setup_logging(run_dir / "train.log")
    train_set = open_dataset(options, "train_sets", options.get("classes"))
    options["classes"] = list(train_set.classes)
    test_set = None
    if options["test_frequency"]:
        test_set = open_dataset(options, "test_sets", options["classes"])
    run = Run(options, run_dir, device, train_set, test_set, given)
    if saved:
        run.restore(saved)
    (run_dir / "config.json").write_text(json.dumps(options, indent=1) + "\n")
    run.go(given.get("max_iters"))


def find_run(given: dict) -> tuple[dict | None, Path]:
    """The checkpoint to go on from, if any, and the run's folder."""
    folder = Path(given.get("save_folder", DEFAULTS["save_folder"]))
    folder /= f"{given.get('version', DEFAULTS['version'])}_{given.get('size', DEFAULTS['size'])}"
    fresh = folder / given.get("date", time.strftime("%Y%m%d-%H%M%S"))
    resume = given.get("resume")
    if resume is None:
        return None, fresh
    for option in ("resume_net", "basenet"):
        if option in given:
            raise UserError(f"--{option} starts a run, --resume goes on with one; give one of them")
    if resume == "auto":
        runs = [fresh] if "date" in given else folder.glob("*")
        found = [r / "last.pth" for r in runs if (r / "last.pth").is_file() and _same(r, given)]
        if not found:
            return None, fresh
        resume = max(found, key=lambda path: path.stat().st_mtime)
    saved = load_checkpoint(resume)
    if "optimizer" not in saved:
        raise UserError(f"{resume} holds weights only; start a run from them with --resume_net")
    return saved, Path(resume).parent


def _same(run_dir: Path, given: dict) -> bool:
    """Whether a run is of the data set and root that are asked for."""
    config = run_dir / "config.json"
    stored = json.loads(config.read_text()) if config.is_file() else {}
    root = str(Path(given["root"]).expanduser().absolute()) if "root" in given else None
    return stored.get("dataset") == given.get("dataset", DEFAULTS["dataset"]) and root in (
        None,
        stored.get("root"),
    )


def _need_tensorboard() -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--visdom writes for TensorBoard, which is not installed; pip install tensorboard"
        ) from error


class Run:
    """One training run: network, optimiser, data, and how far it is."""

    def __init__(self, options, run_dir: Path, device: torch.device, train_set, test_set, given):
        from data.transforms import SSDAugmentation

        self.options = options
        self.dir = run_dir
        self.device = device
        self.train_set = train_set
        self.test_set = test_set
        torch.manual_seed(options["seed"])
        self.net = build_net(options["version"], options["size"], len(options["classes"]) + 1)
        self._start_weights(given)
        self.net.to(device, memory_format=torch.channels_last)
        preset = PRIORS[options["dataset"], options["size"]]
        self.priors = PriorBox(preset).to(device)()
        self.criterion = MultiBoxLoss(
            self.net.num_classes, options["jaccard_threshold"], variance=preset.variance
        )
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=options["lr"],
            momentum=options["momentum"],
            weight_decay=options["weight_decay"],
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options["amp"] == "fp16")
        self.sampler = EpochSampler(len(train_set), options["batch_size"], options["seed"])
        self.loader = training_loader(
            TrainingSet(train_set, SSDAugmentation(options["size"], INPUT_MEAN), options["seed"]),
            self.sampler,
            options["num_workers"],
            device.type == "cuda",
        )
        self.steps_per_epoch = len(self.sampler)
        self.step = given.get("resume_epoch", 0) * self.steps_per_epoch
        self.history: list[dict] = []
        self.totals = {"loss_loc": 0.0, "loss_conf": 0.0, "steps": 0, "seconds": 0.0}
        self.stop_signal = 0

    def _start_weights(self, given: dict) -> None:
        version = self.options["version"]
        if "resume_net" in given:
            if "basenet" in given:
                raise UserError(
                    "--basenet and --resume_net both say where the base network's "
                    "weights are from; give one of them"
                )
            path = Path(given["resume_net"])
            _load_net(self.net, load_checkpoint(path)["model"], path)
            LOGGER.info("all weights from %s (sha256 %.12s)", path, sha256_of(path))
        elif "basenet" in given:
            path = given["basenet"]
            hint = (
                f"the published file for {version} is {BACKBONES[version].weights}; "
                "weights/README.md says where it can be had"
            )
            loaded = load_base(self.net.base, path, hint)
            LOGGER.info(
                "%d of %d tensors of the base network from %s (sha256 %.12s)",
                loaded,
                len(self.net.base.state_dict()),
                path,
                sha256_of(path),
            )
        else:
            LOGGER.info("no --basenet: the base network is trained from scratch")

    def restore(self, saved: dict) -> None:
        """Go on exactly where ``saved`` was made."""
        _load_net(self.net, saved["model"], self.dir / "last.pth")
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        set_rng_state(saved["rng"])
        self.step, self.history, self.totals = saved["step"], saved["history"], saved["totals"]
        LOGGER.info("resumed at step %d (epoch %.2f)", self.step, self.step / self.steps_per_epoch)

    def go(self, max_iters: int | None) -> None:
        """Train to the end, or to ``max_iters`` steps; a signal saves the state first."""
        options = self.options
        self.log = RunLog(self.dir, self.history, options["visdom"])
        end = options["max_epoch"] * self.steps_per_epoch
        end = min(end, max_iters) if max_iters else end
        LOGGER.info(
            "%s at %d, %d classes, %d pictures, %d steps an epoch, %d epochs, on %s (%s); run %s",
            options["version"],
            options["size"],
            len(options["classes"]),
            len(self.train_set),
            self.steps_per_epoch,
            options["max_epoch"],
            self.device,
            options["amp"],
            self.dir,
        )
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train(end)
        except NonFiniteLoss as error:
            names = ", ".join(str(self.train_set.image_path(i)) for i in error.indices)
            raise UserError(
                f"the loss is not finite at step {self.step} ({error}; lr "
                f"{self._lr(self.step):.3g}); the pictures were {names}; the last good checkpoint "
                f"is kept: check their boxes, or lower --lr"
            ) from error
        except (Interrupted, UserError):
            self._save("last.pth")
            LOGGER.info(
                "stopped at step %d; go on with --resume %s", self.step, self.dir / "last.pth"
            )
            raise
        finally:
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _train(self, end: int) -> None:
        net = self.net
        if self.options["ngpu"] > 1:
            net = nn.DataParallel(net, list(range(self.options["ngpu"])))
        if self._epoch_is_open():
            self._finish_epoch()
        while self.step < end:
            self._train_epoch(net, end)
            if self.step % self.steps_per_epoch == 0:
                self._finish_epoch()
        final = f"Final_{self.options['version']}_{self.options['dataset']}.pth"
        if not (
            self.history
            and self.history[-1]["step"] == self.step
            and ("value" in self.history[-1] or self.test_set is None)
        ):
            self._evaluate("final")
        self._save("last.pth", final)
        LOGGER.info("done: %s", self.dir / final)

    def _train_epoch(self, net: nn.Module, end: int) -> None:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        self.sampler.set_epoch(epoch, start)
        stop = min(end - self.step, self.steps_per_epoch - start)
        progress = Progress(
            f"epoch {epoch + 1}/{self.options['max_epoch']}",
            self.steps_per_epoch,
            self.options["log_iters"],
            start,
        )
        began = time.monotonic()
        seconds = self.totals["seconds"]
        steps = train_steps(
            net,
            self.criterion,
            self.priors,
            itertools.islice(self.loader, stop),
            self.optimizer,
            self.scaler,
            map(self._lr, itertools.count(self.step)),
            INPUT_MEAN,
            self.options["amp"],
        )
        try:
            for step in steps:
                self.step += 1
                values = {"loss_loc": step.loss_loc, "loss_conf": step.loss_conf}
                for key, value in values.items():
                    self.totals[key] += value
                self.totals["steps"] += 1
                self.totals["seconds"] = seconds + time.monotonic() - began
                loss = sum(values.values())
                progress.update(len(step.images), loss=loss, **values, lr=step.lr)
                self.log.scalars(self.step, {"loss": loss, **values, "lr": step.lr})
                if self.options["send_images_to_visdom"] and start + 1 == self.step:
                    self.log.images(self.step, "training pictures", step.images[:8].flip(1))
                self._check_signal()
        finally:
            progress.close()

    def _lr(self, step: int) -> float:
        options = self.options
        return lr_at(
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=options["max_epoch"],
            base_lr=options["lr"],
            gamma=options["gamma"],
            milestones=LR_MILESTONES,
            warm_epochs=options["warm_epoch"],
            start_lr=WARMUP_START_LR,
        )

    def _epoch_is_open(self) -> bool:
        """Whether all steps of an epoch are made, but it was stopped before its record."""
        return self.totals["steps"] > 0 and self.step % self.steps_per_epoch == 0

    def _finish_epoch(self) -> None:
        """Evaluate and save as often as asked for, and write the epoch's record."""
        options = self.options
        epoch = self.step // self.steps_per_epoch
        steps, seconds = self.totals["steps"], self.totals["seconds"]
        record = {
            "epoch": epoch,
            "step": self.step,
            "lr": self._lr(self.step - 1),
            "loss_loc": self.totals["loss_loc"] / steps,
            "loss_conf": self.totals["loss_conf"] / steps,
            "images_per_second": round(steps * options["batch_size"] / max(seconds, 1e-9), 2),
            "seconds": round(seconds, 2),
        }
        LOGGER.info(
            "epoch %d: loss %.4f (location %.4f, confidence %.4f), lr %.3g, %.1f img/s",
            epoch,
            record["loss_loc"] + record["loss_conf"],
            record["loss_loc"],
            record["loss_conf"],
            record["lr"],
            record["images_per_second"],
        )
        if options["test_frequency"] and epoch % options["test_frequency"] == 0:
            # Saved before, too: an evaluation may take long, and may be interrupted.
            self._save("last.pth")
            record |= self._evaluate(f"epoch_{epoch}")
        self.history.append(record)
        self.totals = dict.fromkeys(self.totals, 0)
        self.log.add(record)
        names = ["last.pth"]
        if options["save_frequency"] and epoch % options["save_frequency"] == 0:
            names.append(f"{options['version']}_{options['dataset']}_epoches_{epoch}.pth")
        self._save(*names)

    def _evaluate(self, name: str) -> dict:
        """Score the present weights; what of it belongs into the run's log."""
        if self.test_set is None:
            return {}
        directory = self.dir / "ss_predict" / name / set_names(self.options["test_sets"])
        weights = {"file": f"{self.dir.name} at step {self.step}"}
        results = evaluate(
            self.net,
            self.test_set,
            self.priors,
            self.options,
            TRAINING_THRESHOLD,
            directory,
            weights,
            lambda images: self._check_signal(),
        )
        log_results(results, directory)
        self.log.scalars(self.step, {results["metric"]: results["value"]})
        return {key: results[key] for key in ("metric", "value", "per_class")}

    def _save(self, *names: str) -> None:
        state = {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "totals": self.totals,
            "history": self.history,
            "rng": rng_state(),
            "classes": self.options["classes"],
            "config": self.options,
        }
        broken = [k for k, t in state["model"].items() if not t.isfinite().all()]
        if broken:
            raise UserError(
                f"{len(broken)} tensors of the network are not finite at step {self.step} (e.g. "
                f"{broken[0]}); the last good checkpoint in {self.dir} is kept: lower --lr"
            )
        for name in names:
            save_checkpoint(self.dir / name, state)

    def _stop(self, number: int, _) -> None:
        """First signal: stop after the present step. A second one acts at once."""
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)

    def _check_signal(self) -> None:
        if self.stop_signal:
            raise Interrupted


# ---------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    setup_logging()
    try:
        test(given) if "test" in given else train(given)
        return 0
    except UserError as error:
        # An error of a loading process arrives with that process's traceback before it.
        sentence = str(error).strip().rpartition("UserError: ")[2]
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        close_logging()


if __name__ == "__main__":
    sys.exit(main())
