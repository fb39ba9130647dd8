"""The command line of train_test.py: its options, their values, and what they mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from data import DATASETS
from data.config import PRIORS
from engine.distributed import launched
from engine.optim import OPTIMIZERS
from engine.schedule import SCHEDULES
from models import BACKBONES, SIZES
from utils.arguments import (
    boolean,
    count,
    folder_name,
    fraction,
    number,
    positive,
    steps_or_boolean,
)
from utils.device import AMP_TYPES
from utils.errors import UserError

TRAINING_RECIPES = {
    "published": {
        "optimizer": "sgd",
        "lr": 4e-3,
        "schedule": "steps",
        "warm_epoch": 1,
        "norm_decay": True,
        "ema": 0.0,
        "clip_norm": 0.0,
    },
    "modern": {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warm_epoch": 3,
        "norm_decay": False,
        "ema": 0.9998,
        "clip_norm": 0.0,
    },
}
"""Options that a recipe sets, unless they are given."""

DEFAULTS = {
    "recipe": "published",
    "version": "SSD_HarDNet68",
    "size": 512,
    "dataset": "VOC",
    "jaccard_threshold": 0.5,
    "batch_size": 32,
    "num_workers": 8,
    "ngpu": 1,
    "momentum": 0.9,
    "gamma": 0.1,
    "accumulate": 1,
    "sync_bn": False,
    "compile": False,
    "recompute": False,
    "cache": "off",
    "overfit": 0,
    "log_iters": 10,
    "save_folder": "weights/",
    "save_frequency": 10,
    "save_minutes": 10,
    "test_frequency": 10,
    "visdom": False,
    "send_images_to_visdom": False,
    "amp": "off",
    "seed": 0,
}
"""Values of what the command line leaves out, where they do not depend on the data set."""

LATER = frozenset(
    ["priors", "crowds", "recipe", "optimizer", "schedule", "norm_decay", "ema", "clip_norm"]
    + ["accumulate", "sync_bn", "compile", "recompute", "cache", "overfit", "save_minutes"]
)
"""Options that the first checkpoints do not have: they were made with the defaults."""

FIXED_IN_A_RUN = (
    "batch_size", "seed", "train_sets", "overfit", "recipe", "optimizer", "norm_decay", "ema",
)  # fmt: skip
"""Options that a resumed run cannot change: the order of the pictures, and what its state is of."""

OF_THE_MACHINE = frozenset(
    ["amp", "num_workers", "accumulate", "sync_bn", "compile", "recompute", "cache"]
)
"""Options that suit the machine that trains, and say nothing to one that tests."""

DETECTION_OPTIONS = frozenset(
    ["score_threshold", "nms", "class_agnostic", "max_detections", "background_shortcut"]
)
"""Options of --test that decide which boxes are detections."""

OF_ONE_CALL = DETECTION_OPTIONS | {
    "test", "retest", "eval_backend", "class_map", "resume", "resume_net", "resume_epoch",
    "basenet", "max_iters", "date", "device", "cuda", "ngpu",
}  # fmt: skip
"""Options that a checkpoint's configuration does not hand on to the next call."""


def parser(
    *,
    versions: Iterable[str],
    sizes: Iterable[int],
    datasets: Iterable[str],
    suppressions: Iterable[str],
    backends: Iterable[str],
) -> argparse.ArgumentParser:
    """The command line. Options that are not given are absent from the result, so that a
    checkpoint's configuration can fill them in before the defaults do."""
    p = argparse.ArgumentParser(
        description="Train an SSD detector (the default), or evaluate one (--test).",
        epilog="Own data in VOC layout: train_test.py -d VOC --root FOLDER -s 300. What a "
        "checkpoint knows (network, size, data set, classes) need not be repeated with --test or "
        "--resume.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    switch = {"type": boolean, "nargs": "?", "const": True}

    def option(group, *flags: str, help: str, **keywords) -> None:
        name = next(flag for flag in flags if flag.startswith("--")).removeprefix("--")
        if name in DEFAULTS:
            help += f" (default: {DEFAULTS[name]})"
        group.add_argument(*flags, help=help, **keywords)

    # fmt: off
    g = p.add_argument_group("what")
    option(g, "-v", "--version", choices=versions, help="network")
    option(g, "-s", "--size", type=int, choices=sizes, help="side of the network's input")
    option(g, "-d", "--dataset", choices=datasets, help="layout of the data, and whose recipe")
    option(g, "--root", metavar="DIR",
           help="where the data are (default: ~/data/VOCdevkit, ~/data/COCO)")
    option(g, "--classes", metavar="NAMES",
           help="a,b,c or a file with one name a line (default: what the data set declares, else "
                "what its annotations contain)")
    option(g, "--train_sets", metavar="SETS",
           help="e.g. 2007_trainval,2012_trainval, or trainval for a folder that itself holds "
                "Annotations/, JPEGImages/ and ImageSets/")
    option(g, "--crowds", **switch,
           help="COCO: train on crowds as on other boxes, as published; 'false' leaves them out "
                "(default: true)")
    option(g, "--test_sets", metavar="SETS", help="e.g. 2007_test, or test")

    g = p.add_argument_group("testing")
    option(g, "--test", metavar="FILE", help="evaluate this checkpoint instead of training")
    option(g, "--retest", **switch, help="score the detections of an earlier --test again")
    option(g, "--score_threshold", type=fraction, metavar="X",
           help="lowest score of a detection with --test (default: 0.03 VOC, 0.02 COCO)")
    option(g, "--nms", choices=suppressions,
           help="with --test: what becomes of overlapping boxes of a class; soft ones keep them at "
                "a lower score (default: hard)")
    option(g, "--class_agnostic", **switch,
           help="with --test: boxes of different classes suppress each other, too")
    option(g, "--max_detections", type=positive, metavar="N",
           help="with --test: most detections of a picture, of which at most 50 of a class "
                "(default: 300 VOC, 200 COCO)")
    option(g, "--background_shortcut", **switch,
           help="with --test: nothing where the background's score is 0.9 or more, as in the "
                "authors' later release")
    option(g, "--eval-backend", "--eval_backend", choices=backends,
           help="what computes COCO's numbers (default: pycocotools)")

    g = p.add_argument_group("where training starts")
    option(g, "--basenet", metavar="FILE", help="pretrained weights of the base network")
    option(g, "--resume", metavar="FILE|auto",
           help="go on with a run from its checkpoint (auto: the newest run, or a new one)")
    option(g, "--resume_net", metavar="FILE",
           help="start a new run from the weights of a whole detector")
    option(g, "--class_map", metavar="MAP",
           help="own=other,... or a file with one a line: which class of the checkpoint of "
                "--resume_net or --test an own class is (default: the one of equal name, and VOC's "
                "name for COCO's)")
    option(g, "--resume_epoch", type=count, metavar="N",
           help="with --resume_net: the epoch at which the schedule starts (default: 0)")

    g = p.add_argument_group("recipe")
    option(g, "--recipe", choices=TRAINING_RECIPES,
           help="what the options below default to; docs/recipes.md compares them")
    option(g, "-b", "--batch_size", type=positive, metavar="N",
           help="pictures a step, of all GPUs and accumulation steps together")
    option(g, "--accumulate", type=positive, metavar="N",
           help="parts that a step's pictures are cut into, for less memory")
    option(g, "-max", "--max_epoch", type=positive, metavar="N",
           help="epochs (default: 300 VOC, 150 COCO)")
    option(g, "--max_iters", type=positive, metavar="N",
           help="stop after this many steps in all, e.g. to try things out")
    option(g, "--optimizer", choices=OPTIMIZERS, help="(default: sgd; modern: adamw)")
    option(g, "--lr", "--learning-rate", type=number, metavar="X",
           help="initial learning rate (default: 4e-3; modern: 1e-3)")
    option(g, "--momentum", type=fraction, metavar="X", help="of SGD; of AdamW its first beta")
    option(g, "--weight_decay", type=number, metavar="X",
           help="(default: 5e-4 VOC, 1e-4 COCO; modern: 0.05)")
    option(g, "--gamma", type=number, metavar="X",
           help="factor of the learning rate at 60, 80 and 90 %% of the epochs (--schedule steps)")
    option(g, "-we", "--warm_epoch", type=count, metavar="N",
           help="epochs of linear warm-up (default: 1; modern: 3)")
    option(g, "--schedule", choices=SCHEDULES,
           help="of the learning rate after the warm-up (default: steps; modern: cosine)")
    option(g, "--norm_decay", **switch,
           help="weight decay also on biases and on the weights of norms (default: true; modern: "
                "false)")
    option(g, "--ema", type=fraction, metavar="X",
           help="test and keep a moving average of the weights that keeps this share of itself a "
                "step, 0: none (default: 0; modern: 0.9998)")
    option(g, "--clip_norm", type=number, metavar="X",
           help="largest norm of a step's gradient, 0: any (default: 0)")
    option(g, "--jaccard_threshold", type=fraction, metavar="X",
           help="least IoU of a positive prior box")
    option(g, "--seed", type=count, metavar="N", help="of weights, order and augmentation")
    option(g, "--overfit", type=count, metavar="N",
           help="train and test on the first N training pictures, without augmentation: a set-up "
                "that is right learns them by heart; 0: train as usual")

    g = p.add_argument_group("machine")
    option(g, "--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    option(g, "--cuda", **switch, help="the same as --device cuda; 'false': --device cpu")
    option(g, "--ngpu", type=positive, metavar="N",
           help="GPUs of this machine that share a batch, a process each (torchrun starts the "
                "processes of several machines: docs/many_gpus.md)")
    option(g, "--sync_bn", **switch,
           help="batch normalisation over the pictures of all processes")
    option(g, "--num_workers", type=count, metavar="N",
           help="processes that load pictures, unless given no more than cores")
    option(g, "--amp", choices=AMP_TYPES,
           help="precision of the network; a training step in bf16 is two to three times faster on "
                "CPUs that have it")

    option(g, "--compile", **switch, help="train through torch.compile")
    option(g, "--recompute", **switch,
           help="make concatenations anew in the backward pass instead of keeping them: less "
                "memory, more time, the same numbers (not with --compile)")
    option(g, "--cache", metavar="off|memory|DIR",
           help="keep the decoded training pictures, if they fit, in shared memory or in a folder")

    g = p.add_argument_group("output")
    option(g, "--save_folder", metavar="DIR", help="where runs are kept")
    option(g, "--date", metavar="NAME", type=folder_name,
           help="name of the run (default: the time)")
    option(g, "--save_frequency", type=count, metavar="N",
           help="epochs between kept checkpoints, 0: none")
    option(g, "--save_minutes", type=count, metavar="N",
           help="minutes between savings of last.pth inside an epoch, 0: none")
    option(g, "--test_frequency", type=count, metavar="N",
           help="epochs between evaluations (and one at the end), 0: none and no test set")
    option(g, "--log_iters", type=steps_or_boolean, metavar="N",
           help="steps between log lines where there is no terminal, 0: none")
    option(g, "--visdom", **switch, help="live plots, written for TensorBoard")
    option(g, "--send_images_to_visdom", **switch,
           help="with --visdom: training pictures with their boxes, and detections, too")
    # fmt: on
    return p


# ---------------------------------------------------------------- meaning


def device_name(given: dict) -> str:
    """The device that --device and --cuda mean; UserError where they contradict each other."""
    name = given.get("device", "auto")
    if "cuda" in given:
        wanted = "cuda" if given["cuda"] else "cpu"
        if name not in ("auto", wanted) and not name.startswith(f"{wanted}:"):
            raise UserError(f"--cuda {given['cuda']} contradicts --device {name}; give one of them")
        name = wanted if name == "auto" else name
    return name


def check_gpus(ngpu: int, device: torch.device) -> None:
    """UserError unless ``ngpu`` GPUs, counted from the first, can share a batch."""
    if launched() and ngpu != int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(
            f"--ngpu {ngpu} contradicts torchrun, which has started "
            f"{os.environ['LOCAL_WORLD_SIZE']} processes here; leave the option out"
        )
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if ngpu > max(gpus, 1):
        raise UserError(f"--ngpu {ngpu} on {device}: PyTorch sees {gpus} GPUs; give fewer")
    if ngpu > 1 and device.index:
        raise UserError(f"--ngpu {ngpu} uses the first GPUs; leave --device {device} out")


def check_config(saved: Mapping, path: Path) -> dict:
    """The configuration of one of our checkpoints, with its classes.

    Raises:
        UserError: a field is missing, or not of the kind that this program writes.
    """
    config, classes = saved.get("config"), saved.get("classes")
    expected = {**DEFAULTS, **TRAINING_RECIPES["published"], "root": "", "priors": ""}
    expected |= {"max_epoch": 1, "weight_decay": 0.0, "crowds": True}
    expected |= {"train_sets": [], "test_sets": []}
    if not isinstance(config, dict):
        raise UserError(f"{path}: its configuration is no dict; is it a file of this program?")
    if not (isinstance(classes, list) and classes and all(isinstance(c, str) for c in classes)):
        raise UserError(f"{path}: its classes are {classes!r}, expected a list of names")
    choices = {"version": BACKBONES, "size": SIZES, "dataset": DATASETS, "amp": AMP_TYPES}
    choices["priors"] = {name for name, _ in PRIORS}
    choices |= {"recipe": TRAINING_RECIPES, "schedule": SCHEDULES, "optimizer": OPTIMIZERS}
    for key, example in expected.items():
        if key in LATER and key not in config:
            continue
        value = config.get(key)
        right = isinstance(value, type(example)) or (
            isinstance(example, float) and isinstance(value, int)
        )
        if not right or (key in choices and value not in choices[key]):
            raise UserError(f"{path}: its configuration has {key} {value!r}, which is not valid")
    if config["size"] not in BACKBONES[config["version"]].sizes:
        raise UserError(f"{path}: {config['version']} does not exist at size {config['size']}")
    return {**config, "classes": classes}
