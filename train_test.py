"""Train and evaluate SSD detectors.

    python train_test.py -d VOC -v SSD_HarDNet68 -s 512                    # train
    python train_test.py --test weights/SSD_HarDNet68_512/.../Final_SSD_HarDNet68_VOC.pth

Exit status: 0 done, 1 unexpected failure, 2 bad usage or bad input, 130 interrupted (state saved).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from data.loading import EpochSampler, TrainingSet, training_loader
from data.transforms import ResizeOnly, SSDAugmentation
from engine.distributed import World, end
from engine.evaluate import Evaluation, detect_by, detect_set
from engine.job import run_job
from engine.options import Call
from engine.run import Run, open_run
from engine.start import starting_weights
from engine.testing import open_test
from engine.trainer import Trainer
from layers import Detect, MultiBoxLoss, PriorBox
from models import build_net, prior_config
from utils.checkpoint import load_weights


def train(call: Call, given: Mapping[str, object], world: World) -> None:
    """Train, from scratch or from where a checkpoint left off."""
    run = open_run(call, given, world)
    with run.folder.opened():
        world.decide(run.check_folder)
        run.log_data(asked=call.resume)
        trainer = build_trainer(run, call, world)
        trainer.begin()
        trainer.run(call.max_iters, call.max_hours)


def build_trainer(run: Run, call: Call, world: World) -> Trainer:
    """Wire network, prior boxes, loss, images and evaluation of a run."""
    torch.manual_seed(run.options.seed)
    net = build_net(run.options.version, run.options.size, run.options.num_classes)
    if not run.saved:
        run = starting_weights(net, run, call)
    options, cuda = run.options, run.device.type == "cuda"
    net.recompute = options.recompute
    if options.sync_bn and world.size > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(run.device, memory_format=torch.channels_last)

    boxes = prior_config(options.version, options.priors, options.size)
    priors = PriorBox(boxes).to(run.device)()
    criterion = MultiBoxLoss(options.num_classes, options.jaccard_threshold,
                             variance=boxes.variance, least_negatives=options.background_negatives)
    detect = Detect.of(run.detection, boxes.variance)

    augment = SSDAugmentation(options.size, expansion=options.expansion)
    if options.overfit:
        augment = ResizeOnly(options.size)
    samples = TrainingSet(run.train_set, augment, options.seed, run.pull)
    sampler = EpochSampler(len(samples), options.batch_size, options.seed, world.rank, world.size,
                           options.accumulate)
    loader = training_loader(samples, sampler, options.num_workers, pin_memory=cuda)

    evaluate = None
    if run.test_set is not None:
        evaluate = Evaluation(detect, priors, run, world)
    trainer = Trainer(net, criterion, priors, loader, evaluate, run, world)
    trainer.state.step = (call.resume_epoch or 0) * trainer.steps_per_epoch
    if run.saved:
        trainer.restore(run.saved, run.path)
    return trainer


def test(call: Call, given: Mapping[str, object], world: World) -> None:
    """Evaluate a checkpoint or an exported file, or score its kept detections again."""
    job = world.in_turn(lambda: open_test(call, given, world))
    with job.opened(world):
        job.log_data()
        if call.retest:
            found = None
            if world.main:
                job.score_again(call)
        elif job.predictor:
            found = detect_by(job.predictor, job.dataset, job.options)
        else:
            options = job.options
            net = build_net(options.version, options.size, options.num_classes)
            load_weights(net, job.weights, call.test)
            net.to(job.device, memory_format=torch.channels_last)
            boxes = prior_config(options.version, options.priors, options.size)
            priors = PriorBox(boxes).to(job.device)()
            detect = Detect.of(job.detection, boxes.variance)
            found = detect_set(net, detect, priors, job.dataset, options, world)
        if found is not None:
            job.keep(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_job(__file__, argv, train, test)


if __name__ == "__main__":
    end(main())
