"""One training run: the loop over epochs, its record on the disk, and how it is interrupted."""

from __future__ import annotations

import itertools
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.distributed import SINGLE_PROCESS, World
from engine.optim import MovingAverage, build_optimizer
from engine.steps import Step, train_steps
from utils.checkpoint import load_weights, rng_state, save_checkpoint, set_rng_state
from utils.errors import UserError
from utils.logger import LOGGER, Progress, RunLog

# A launcher hands a terminal's Ctrl-C on to processes that have seen it themselves.
SAME_SIGNAL_SECONDS = 3


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived."""


class Trainer:
    """Trains ``net`` in place; everything that it needs is given to it.

    Args:
        net: maps images to (loc, conf), on its device.
        forward: what a step calls in its place: ``net`` itself, or compiled, or a replica.
        criterion: a ``layers.MultiBoxLoss``.
        priors: [P, 4] on the device.
        loader: its batches (images, targets, indices) of an epoch follow
            ``loader.batch_sampler.set_epoch(epoch, start)``.
        learning_rate: of a step, 0-based and counted over the whole run.
        evaluate: called as evaluate(net, name, on_batch) when an evaluation is due; returns
            results with "metric", "value", "per_class" and "draw" (draws some of the detections,
            uint8 [H, W, 3] BGR), or None where another process scores. None: there is nothing to
            test on.
        options: the configuration.
        identity: what every checkpoint carries beside the state: classes, config, data.
        mean: of the input's channels.
        directory: the run's folder.
        image_name: of a data-set index, for messages.
        draw_batch: draw_batch(images, targets) draws a training batch, uint8 [H, W, 3] BGR.
        world: the processes that train together.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        forward: nn.Module,
        criterion: nn.Module,
        priors: Tensor,
        loader,
        learning_rate: Callable[[int], float],
        evaluate: Callable[[nn.Module, str, Callable[[int], None]], dict | None] | None,
        options: dict,
        identity: dict,
        mean: Sequence[float],
        directory: Path,
        image_name: Callable[[int], str],
        draw_batch: Callable[[Tensor, Sequence[Tensor]], np.ndarray],
        world: World = SINGLE_PROCESS,
    ):
        self.net = net
        self.forward = forward
        self.criterion = criterion
        self.priors = priors
        self.loader = loader
        self.learning_rate = learning_rate
        self.evaluate = evaluate
        self.options = options
        self.identity = identity
        self.mean = mean
        self.directory = directory
        self.image_name = image_name
        self.draw_batch = draw_batch
        self.world = world
        self.optimizer = build_optimizer(net, options)
        self.average = MovingAverage(net, options["ema"]) if options["ema"] else None
        self.scaler = torch.amp.GradScaler(priors.device.type, enabled=options["amp"] == "fp16")
        self.steps_per_epoch = loader.batch_sampler.steps
        self.step = 0
        self.history: list[dict] = []
        self.totals = self._no_totals()
        self.evaluated_at = -1
        # Steps whose values were not read yet: reading a GPU's at once would wait for it.
        self.unread: deque[Step] = deque()
        self.lag = 1 if priors.device.type == "cuda" else 0
        # Whether the state is that after `step` whole steps, so that it may be saved.
        self.consistent = True
        self.best: dict = {}
        self.signalled_at: float | None = None
        self.stop_at: int | None = None

    def restore(self, saved: dict, path: Path) -> None:
        """Go on exactly where the checkpoint ``saved``, read from ``path``, was made."""
        load_weights(self.net, saved.get("raw_model", saved["model"]), path)
        try:
            if self.average:
                load_weights(self.average.net, saved["model"], path)
                self.average.updates = int(saved["average_updates"])
            self.optimizer.load_state_dict(saved["optimizer"])
            # The configuration in force decides: an option may have been given anew. Not of the
            # rate, which is drawn with every step and may have no step to come.
            fresh = build_optimizer(self.net, self.options)
            for group, wanted in zip(self.optimizer.param_groups, fresh.param_groups, strict=True):
                group.update({k: v for k, v in wanted.items() if k not in ("params", "lr")})
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            set_rng_state(saved["rng"])
            self.step = int(saved["step"])
            self.history = list(saved["history"])
            # "waited" is not in the first files.
            self.totals = {key: saved["totals"].get(key, 0.0) for key in self.totals}
            scored = [r for r in self.history if r.get("value") is not None]
            best = max(scored, key=lambda r: r["value"], default={})
            best = {key: best[key] for key in ("step", "value", "metric") if best}
            self.best = dict(saved.get("best", best))  # not in the first files
            if self.history and "metric" in self.history[-1]:
                self.evaluated_at = self.history[-1]["step"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path} cannot be resumed from: {error!r} in its state") from error
        LOGGER.info("resumed at step %d (epoch %.2f)", self.step, self.step / self.steps_per_epoch)

    def run(self, max_iters: int | None = None) -> None:
        """Train to the last epoch, or to ``max_iters`` steps in all.

        Raises:
            Interrupted: by a signal, after the state was saved.
            UserError: a loss that is not finite (nothing is saved: the last good checkpoint
                stays), a picture that cannot be read, or a file that cannot be written.
        """
        end = self.options["max_epoch"] * self.steps_per_epoch
        end = min(end, max_iters) if max_iters else end
        if end < self.step:
            raise UserError(
                f"{end} steps are asked for, but the run is at step {self.step} already; raise "
                "--max_iters or --max_epoch"
            )
        self.log = RunLog(self.directory, self.history, self.options["visdom"], self.world.main)
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train(end)
        except BaseException as error:
            # A dead worker or a vanished picture costs nothing; a failure inside a step costs the
            # steps since the last checkpoint, as nobody knows how far it came.
            if self.consistent:
                self._save("last.pth")
                LOGGER.info(
                    "stopped at step %d; go on with --resume %s", self.step, self._path("last.pth")
                )
            if isinstance(error, Interrupted):
                # A launcher ends what is left as soon as one process has ended.
                self.world.decide(lambda: None)
            raise
        finally:
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------ the loop

    def _train(self, end: int) -> None:
        self.saved_at = time.monotonic()
        if self.step == end:
            LOGGER.info(
                "all %d steps are trained; a higher --max_epoch or --max_iters trains on", end
            )
        if self.totals["steps"] and self.step % self.steps_per_epoch == 0:
            self._finish_epoch()  # it was interrupted between its last step and its record
        while self.step < end:
            self._train_epoch(end)
            if self.step % self.steps_per_epoch == 0:
                self._finish_epoch()
        final = f"Final_{self.options['version']}_{self.options['dataset']}.pth"
        names = [final]
        if self.evaluate and self.evaluated_at != self.step:
            self._save("last.pth")
            record = self._evaluate("final")
            if self.best.get("step") == self.step:
                names.append("best.pth")
            self.log.add({"step": self.step, **record})
        self._save(*names, "last.pth")
        self._summarise(final)

    def _train_epoch(self, end: int) -> None:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        self.loader.batch_sampler.set_epoch(epoch, start)
        label = f"epoch {epoch + 1}/{self.options['max_epoch']}"
        progress = Progress(label, self.steps_per_epoch, self.options["log_iters"], start)
        before, began = self.totals["seconds"], time.monotonic()
        steps = train_steps(
            self.forward,
            self.criterion,
            self.priors,
            self._batches(min(end - self.step, self.steps_per_epoch - start)),
            self.optimizer,
            self.scaler,
            map(self.learning_rate, itertools.count(self.step)),
            self.mean,
            self.options["amp"],
            accumulate=self.options["accumulate"],
            clip_norm=self.options["clip_norm"],
            world=self.world,
            stopping=lambda: self.signalled_at is not None,
        )
        try:
            for done in steps:
                if self.average:
                    self.average.update(self.net)
                self.step += 1
                self.unread.append(done)
                self.totals["seconds"] = before + time.monotonic() - began
                self.consistent = True
                self._read(self.lag, progress)
                first = self.step == epoch * self.steps_per_epoch + start + 1
                if first and self.options["send_images_to_visdom"]:
                    draw = partial(self.draw_batch, done.images, done.targets)
                    self.log.picture(self.step, "training pictures", draw)
                # All processes leave after the same step, however early one of them read of it.
                if self.stop_at is not None and self.step >= self.stop_at + self.lag:
                    raise Interrupted
                due = time.monotonic() - self.saved_at > 60 * self.options["save_minutes"] > 0
                if due and self.world.main:
                    self._read(0, progress)
                    self._save("last.pth")
            self._read(0, progress)
            if self.stop_at is not None:
                raise Interrupted
        finally:
            progress.close()

    def _batches(self, count: int) -> Iterator:
        """The loader's batches of ``count`` steps, keeping track of whether one is under way."""
        batches = iter(self.loader)
        for _ in range(count):
            for part in range(self.options["accumulate"]):
                asked = time.monotonic()
                batch = next(batches)
                self.totals["waited"] += time.monotonic() - asked
                # Nothing is touched before all of a step's batches are there.
                self.consistent = part < self.options["accumulate"] - 1
                yield batch

    def _read(self, leave: int, progress: Progress | None = None) -> None:
        """Take in what the steps did, but for the latest ``leave``.

        Raises:
            UserError: a loss that is not finite.
        """
        while len(self.unread) > leave:
            step = self.step - len(self.unread)
            done = self.unread.popleft()
            loss_loc, loss_conf, stop = done.results()
            if not np.isfinite([loss_loc, loss_conf]).all():
                self.consistent = False
                self._refuse_loss(step, done.lr, loss_loc, loss_conf)
            losses = {"loss_loc": loss_loc, "loss_conf": loss_conf}
            for key, value in losses.items():
                self.totals[key] += value
            pictures = self.loader.batch_sampler.batch_size
            self.totals["steps"] += 1
            self.totals["images"] += pictures
            shown = {"loss": loss_loc + loss_conf, **losses, "lr": done.lr}
            if progress is not None:
                progress.update(pictures, **shown)
            self.log.scalars(step + 1, shown)
            if stop and self.stop_at is None:
                self.stop_at = step + 1

    def _refuse_loss(self, step: int, lr: float, loss_loc: float, loss_conf: float) -> None:
        indices = self.loader.batch_sampler.batch(step % self.steps_per_epoch)
        names = ", ".join(self.image_name(i) for i in indices)
        raise UserError(
            f"the loss is not finite at step {step} (location loss {loss_loc}, confidence loss "
            f"{loss_conf}; lr {lr:.3g}); {self._kept()}; check the boxes of the batch, or lower "
            f"--lr; its pictures: {names}"
        )

    def _finish_epoch(self) -> None:
        """Evaluate and save as often as asked for, and write the epoch's record."""
        options = self.options
        epoch = self.step // self.steps_per_epoch
        steps, seconds = self.totals["steps"], max(self.totals["seconds"], 1e-9)
        record = {
            "epoch": epoch,
            "step": self.step,
            "lr": self.learning_rate(self.step - 1),
            "loss_loc": self.totals["loss_loc"] / steps,
            "loss_conf": self.totals["loss_conf"] / steps,
            "images_per_second": round(self.totals["images"] / seconds, 2),
            "seconds": round(seconds, 2),
            "waiting_for_data": round(self.totals["waited"] / seconds, 3),
        }
        if self.priors.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.priors.device)
            record["gpu_memory_gib"] = round(peak / 2**30, 2)
            torch.cuda.reset_peak_memory_stats(self.priors.device)
        LOGGER.info(
            "epoch %d: loss %.4f (location %.4f, confidence %.4f), lr %.3g, %.1f img/s, %.0f %% of "
            "the time waiting for data",
            epoch,
            record["loss_loc"] + record["loss_conf"],
            record["loss_loc"],
            record["loss_conf"],
            record["lr"],
            record["images_per_second"],
            100 * record["waiting_for_data"],
        )
        speed = ("images_per_second", "waiting_for_data", "gpu_memory_gib")
        self.log.scalars(self.step, {key: record[key] for key in speed if key in record})
        names = []
        if self.evaluate and epoch % options["test_frequency"] == 0:
            # Saved before, too: an evaluation may take long, and may be interrupted.
            self._save("last.pth")
            record |= self._evaluate(f"epoch_{epoch}")
            if self.best.get("step") == self.step:
                names.append("best.pth")
        self.history.append(record)
        self.totals = self._no_totals()
        self.log.add(record)
        if options["save_frequency"] and epoch % options["save_frequency"] == 0:
            names.append(f"{options['version']}_{options['dataset']}_epoches_{epoch}.pth")
        # Last: a run that is killed before goes on from the one before, and makes the others.
        self._save(*names, "last.pth")

    def _evaluate(self, name: str) -> dict:
        """Score the present weights; returns what of it belongs into the run's log."""
        # Processes that score together cannot leave one by one: they stop at the next step.
        alone = self.world.size == 1
        net = self._tested_net()
        self.world.share_statistics(net)
        results = self.evaluate(net, name, lambda images: self._check_signal() if alone else None)
        self.evaluated_at = self.step
        if results is None:
            return {}
        value = results["value"]
        if value is not None and value > self.best.get("value", -np.inf):
            self.best = {"step": self.step, "value": value, "metric": results["metric"]}
        self.log.scalars(self.step, {results["metric"]: value})
        if self.options["send_images_to_visdom"]:
            self.log.picture(self.step, "detections", results["draw"])
        return {key: results[key] for key in ("metric", "value", "per_class")}

    def _summarise(self, final: str) -> None:
        """Where everything is that the run has left."""
        kept = {
            "last weights": final,
            "best weights": "best.pth",
            "to go on from": "last.pth",
            "log": "train.log",
            "log for programs": "log.jsonl",
            "configuration": "config.json",
            "curves (tensorboard --logdir)": "tensorboard",
        }
        LOGGER.info("done: %d steps", self.step)
        for what, name in kept.items():
            if self._path(name).exists():
                LOGGER.info("  %-30s %s", what, self._path(name))
        scores = self._path("ss_predict")
        if scores.exists():
            LOGGER.info("  %-30s %s", "scores and detections", scores)
        if self.best:
            LOGGER.info("  best %(metric)s: %(value).4f at step %(step)d", self.best)

    # ------------------------------------------------------------ state

    @staticmethod
    def _no_totals() -> dict[str, float]:
        """Sums over the steps of an epoch so far; part of the state."""
        return {
            "loss_loc": 0.0, "loss_conf": 0.0, "steps": 0, "images": 0, "seconds": 0.0,
            "waited": 0.0,
        }  # fmt: skip

    def _save(self, *names: str) -> None:
        self._read(0)
        if not self.world.main:
            return
        state = {
            "model": self._tested_net().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "totals": self.totals,
            "history": self.history,
            "best": self.best,
            "rng": rng_state(),
            **self.identity,
        }
        if self.average:
            state["raw_model"] = self.net.state_dict()
            state["average_updates"] = self.average.updates
        broken = [key for key, tensor in state["model"].items() if not tensor.isfinite().all()]
        if broken:
            self.consistent = False
            raise UserError(
                f"{len(broken)} tensors of the network are not finite at step {self.step} (e.g. "
                f"{broken[0]}); {self._kept()}; lower --lr"
            )
        for name in names:
            previous = self._path("previous.pth") if name == "last.pth" else None
            try:
                save_checkpoint(self._path(name), state, previous)
            except UserError:
                self.consistent = False  # last.pth alone would say that the others were made
                raise
        self.saved_at = time.monotonic()

    def _tested_net(self) -> nn.Module:
        """The network that is tested and handed on: the average, where there is one."""
        return self.average.net if self.average else self.net

    def _kept(self) -> str:
        last = self._path("last.pth")
        return f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _on_signal(self, number: int, _) -> None:
        """First signal: stop after the present step. A second one acts at once."""
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
        elif now - self.signalled_at > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _check_signal(self) -> None:
        if self.signalled_at is not None:
            raise Interrupted
