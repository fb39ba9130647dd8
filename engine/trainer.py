"""One training run: the loop over epochs, its record on the disk, and its interruption."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.loading import Loader, WorkerDied
from engine.distributed import World
from engine.evaluate import Evaluation
from engine.folder import RunLog
from engine.optim import MovingAverage, build_optimizer, check_moments, freeze, lr_at
from engine.run import Run
from engine.state import State, Totals
from engine.steps import Batch, Step, TrainStep
from inference.draw import draw_batch
from layers import MultiBoxLoss
from utils.checkpoint import load_weights, rng_state, set_rng_state
from utils.errors import UserError
from utils.logger import LOGGER, Progress
from utils.signals import Interrupted, StopSignal, TimeUp
from utils.trackers import Trackers


class Trainer:
    """Trains ``net`` in place.

    Args of the constructor:
        net: maps images to (loc, conf), on its device.
        criterion: a ``layers.MultiBoxLoss``.
        priors: [P, 4] on the device.
        loader: a ``data.loading.training_loader``.
        evaluate: scores the network when an evaluation is due; None without a test set.
        run: its options, data and folder.
        world: the processes that train together.
    """

    def __init__(self, net: nn.Module, criterion: MultiBoxLoss, priors: Tensor, loader: Loader,
                 evaluate: Evaluation | None, run: Run, world: World):
        self.net = net
        self.loader = loader
        self.sampler = loader.batch_sampler
        self.evaluate = evaluate
        self.train_set, self.data = run.train_set, run.data
        self.test_data = run.test_set.fingerprint() if run.test_set else None
        self.options = options = run.options
        self.folder = run.folder
        self.world = world
        self.device = priors.device
        frozen = freeze(net, options.freeze)
        self.optimizer = build_optimizer(net, options)
        forward = torch.compile(net) if options.compile else net
        self.train_step = TrainStep(
            world.replicate(forward, self.device), criterion, priors, self.optimizer,
            amp=options.amp, clip_norm=options.clip_norm, frozen=frozen, world=world)
        self.average = MovingAverage(net, options.ema) if options.ema else None
        self.steps_per_epoch = self.sampler.steps
        self.state = State()
        self.evaluated_at = -1
        told = self._finishing if world.main else None
        self.stop = StopSignal(told=told, alone=world.size == 1)
        self.testing = False
        self.stop_at: int | None = None
        """The step after which every process has read that one of them was asked to stop."""
        self.unread: deque[Step] = deque()
        """Steps whose values were not read yet. Reading a GPU's at once would wait for it."""
        self.lag = 1 if self.device.type == "cuda" else 0
        self.consistent = True
        """Whether the tensors are those after ``state.step`` whole steps, so that they may be
        saved."""

    def begin(self) -> None:
        """Write config.json and log what the run is."""
        options, sampler = self.options, self.sampler
        self.folder.save_options(options)
        LOGGER.info("%s at %d, %d classes, %d images, %d steps an epoch, %d epochs, on %s "
                    "(--amp %s); run %s", options.version, options.size, len(options.classes),
                    len(self.train_set), self.steps_per_epoch, options.max_epoch, self.device,
                    options.amp, self.folder.path)
        part = sampler.batch_size // (self.world.size * options.accumulate)
        LOGGER.info("a step: %d images in all (%d processes x %d accumulation steps x %d), "
                    "learning rate %g (%s recipe)", sampler.batch_size, self.world.size,
                    options.accumulate, part, options.lr, options.recipe)
        if sampler.batch_size < options.batch_size:
            LOGGER.warning("  --batch_size %d is lowered to %d: the training set has %d images",
                           options.batch_size, sampler.batch_size, len(self.train_set))

    def restore(self, saved: dict, path: Path) -> None:
        """Continue exactly where the checkpoint ``saved``, read from ``path``, was made.

        Raises:
            UserError: the state of the checkpoint does not fit the run.
        """
        self.state = State.of(saved, path)
        if self.state.history and "metric" in self.state.history[-1]:
            self.evaluated_at = self.state.history[-1]["step"]
        load_weights(self.net, saved.get("raw_model", saved["model"]), path)
        try:
            if self.average:
                load_weights(self.average.net, saved["model"], path)
                self.average.updates = int(saved["average_updates"])
            self.optimizer.load_state_dict(saved["optimizer"])
            check_moments(self.optimizer)
            # An option may be given anew on resume, so today's options decide. The rate is set at
            # every step, and a run that has ended keeps its last one.
            fresh = build_optimizer(self.net, self.options)
            for group, wanted in zip(self.optimizer.param_groups, fresh.param_groups, strict=True):
                group.update({k: v for k, v in wanted.items() if k not in ("params", "lr")})
            if saved["scaler"]:
                self.train_step.scaler.load_state_dict(saved["scaler"])
            set_rng_state(saved["rng"])
        except UserError:
            raise
        except Exception as error:  # whatever PyTorch makes of a foreign value
            raise UserError(f"{path} cannot be resumed from: {error!r:.200} in its state; give "
                            "another, or start from its weights with --resume_net") from error
        other = saved["config"].get("test_sets") != self.options.plain()["test_sets"]
        if other or self.test_data and saved.get("test_data") not in (None, self.test_data):
            self.state.best = {}
            LOGGER.info("other images or annotations to test on: the best AP is looked for anew")
        self.test_data = self.test_data or saved.get("test_data")  # of the best AP
        step = self.state.step
        LOGGER.info("resumed at step %d (epoch %.2f)", step, step / self.steps_per_epoch)

    def run(self, max_iters: int | None = None, max_hours: float | None = None) -> None:
        """Train to the last epoch, to ``max_iters`` steps in all, or as long as --patience says.

        Raises:
            Interrupted: by a signal, after the state was saved; TimeUp after ``max_hours``.
            UserError: a loss that is not finite (nothing is saved: the last good checkpoint
                stays), an image that cannot be read, or a file that cannot be written.
        """
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else inf
        end = self.options.max_epoch * self.steps_per_epoch
        end = min(end, max_iters) if max_iters else end
        if end < self.state.step:
            raise UserError(f"{end} steps are asked for, but the run is at step {self.state.step} "
                            "already; raise --max_iters or --max_epoch")
        main = self.world.main
        self.log = RunLog(self.folder.path, self.state.history, main)
        names = self.options.trackers if main else ()
        self.trackers = Trackers(names, self.folder.path, self.options.plain())
        with self.stop:
            try:
                self._train(end)
            except BaseException as error:
                self._save_on(error)
                if isinstance(error, WorkerDied) and self.stop.asked and self.world.size == 1:
                    raise Interrupted from error  # the signal was for the loading process, too
                raise
            finally:
                self.trackers.close()

    def _finishing(self) -> str:
        what = "the test at " if self.testing else ""
        return f"finishing {what}step {self.state.step + (not self.testing)}, again to stop now"

    def _save_on(self, error: BaseException) -> None:
        # A failure inside a step is not saved: the weights may be half updated.
        if self.consistent:
            self._save("last.pth")
            LOGGER.info("stopped at step %d; continue with --resume %s", self.state.step,
                        self.folder / "last.pth")
        if isinstance(error, Interrupted):
            # A launcher ends the other processes as soon as one has ended: wait for all.
            self.world.decide(lambda: None)

    # ------------------------------------------------------------ the loop

    def _train(self, end: int) -> None:
        self.saved_at = time.monotonic()
        if self.state.step == end:
            LOGGER.info("all %d steps are trained; a higher --max_epoch or --max_iters trains on",
                        end)
        if self.state.totals.steps and self.state.step % self.steps_per_epoch == 0:
            self._finish_epoch()  # the run was interrupted between an epoch's last step and record
        while self.state.step < end and not self._without_gain():
            self._train_epoch(end)
            if self.state.step % self.steps_per_epoch == 0:
                self._finish_epoch()
        names = [self.folder.final]
        if self.evaluate and self.evaluated_at != self.state.step:
            self._save("last.pth")
            record = self._evaluate("final")
            if self.state.best.get("step") == self.state.step:
                names.append("best.pth")
            self.log.add({"step": self.state.step, **record})
        self._save("last.pth", *names)
        LOGGER.info("done: %d steps", self.state.step)
        self.folder.summarise()
        if self.state.best:
            LOGGER.info("  best %(metric)s: %(value).4f at step %(step)d", self.state.best)

    def _without_gain(self) -> bool:
        """Return whether the last --patience evaluations gave no better AP; all ranks agree."""
        patience, best = self.options.patience, self.state.best
        if not patience:
            return False
        later = [each for each in self.state.history
                 if "metric" in each and each["step"] > best.get("step", inf)]
        ends = bool(self.world.decide(lambda: len(later) >= patience))  # rank 0 has the scores
        if ends:
            LOGGER.info("training ends: no better AP in %d evaluations (--patience)", patience)
        return ends

    def _late(self) -> bool:
        return self.deadline < inf and self.world.main and time.monotonic() > self.deadline

    def _reason(self) -> Interrupted:
        """Return the reason why all processes stop, as rank 0 has it."""
        late = self.world.decide(lambda: self._late() and not self.stop.asked)
        return TimeUp() if late else Interrupted()

    def _train_epoch(self, end: int) -> None:
        epoch, start = divmod(self.state.step, self.steps_per_epoch)
        self.sampler.set_epoch(epoch, start)
        label = f"epoch {epoch + 1}/{self.options.max_epoch}"
        progress = Progress(label, self.steps_per_epoch, self.options.log_iters, start)
        before, began = self.state.totals.seconds, time.monotonic()
        try:
            for parts in self._batches(min(end - self.state.step, self.steps_per_epoch - start)):
                done = self._make_step(parts)
                self.state.totals.seconds = before + time.monotonic() - began
                self._read(self.lag, progress)
                if self.state.step == epoch * self.steps_per_epoch + start + 1:
                    self._show(done)
                if self.world.size == 1:
                    self.stop.check()
                # All processes leave after the same step, however early one of them read of it.
                if self.stop_at is not None and self.state.step >= self.stop_at + self.lag:
                    raise self._reason()
                due = time.monotonic() - self.saved_at > 60 * self.options.save_minutes > 0
                if due and self.world.main:
                    self._read(0, progress)
                    self._save("last.pth")
            self._read(0, progress)
            if self.stop_at is not None:
                raise self._reason()
        finally:
            progress.close()

    def _batches(self, steps: int) -> Iterator[list[Batch]]:
        """Yield the parts of each of ``steps`` steps, and count the seconds of waiting for them."""
        batches = iter(self.loader)
        for _ in range(steps):
            asked = time.monotonic()
            parts = [next(batches) for _ in range(self.options.accumulate)]
            self.state.totals.waited += time.monotonic() - asked
            yield parts

    def _make_step(self, parts: list[Batch]) -> Step:
        self.consistent = False
        lr = lr_at(self.state.step, self.steps_per_epoch, self.options)
        done = self.train_step(parts, lr, self.stop.asked or self._late())
        if self.average:
            self.average.update(self.net)
        self.state.step += 1
        self.unread.append(done)
        self.consistent = True
        return done

    def _show(self, done: Step) -> None:
        if self.options.send_images_to_visdom:
            draw = partial(draw_batch, done.images, done.targets, self.options.classes)
            self.trackers.image(self.state.step, "training images", draw)

    def _read(self, leave: int, progress: Progress | None = None) -> None:
        """Add the results of the unread steps to the totals, but for the latest ``leave``.

        Raises:
            UserError: a loss is not finite.
        """
        while len(self.unread) > leave:
            step = self.state.step - len(self.unread)
            done = self.unread.popleft()
            loss_loc, loss_conf, stop = done.results()
            if not np.isfinite([loss_loc, loss_conf]).all():
                self.consistent = False
                self._refuse_loss(step, done.lr, loss_loc, loss_conf)
            totals, images = self.state.totals, self.sampler.batch_size
            totals.loss_loc += loss_loc
            totals.loss_conf += loss_conf
            totals.steps += 1
            totals.images += images
            shown = {"loss": loss_loc + loss_conf, "loss_loc": loss_loc, "loss_conf": loss_conf}
            shown["lr"] = done.lr
            if progress is not None:
                progress.update(images, **shown)
            self.trackers.scalars(step + 1, shown)
            if stop and self.stop_at is None:
                self.stop_at = step + 1

    def _refuse_loss(self, step: int, lr: float, loss_loc: float, loss_conf: float) -> None:
        indices = self.sampler.batch(step % self.steps_per_epoch)
        names = ", ".join(str(self.train_set.image_path(i)) for i in indices)
        raise UserError(f"the loss is not finite at step {step} (location loss {loss_loc}, "
                        f"confidence loss {loss_conf}; lr {lr:.3g}); {self.folder.last_good()}; "
                        f"check the boxes of the batch, or lower --lr; its images: {names}")

    def _finish_epoch(self) -> None:
        """Evaluate and save as often as asked for, and write the epoch's record."""
        epoch = self.state.step // self.steps_per_epoch
        record = self._record(epoch)
        names = []
        tested = self.evaluate and epoch % self.options.test_frequency == 0
        if tested or not self.state.history:
            # An evaluation takes long and may be interrupted: save before it, too. A run is resumed
            # from last.pth, so that the first one comes before all other files.
            self._save("last.pth")
        if tested:
            record |= self._evaluate(f"epoch_{epoch}")
            if self.state.best.get("step") == self.state.step:
                names.append("best.pth")
        self.state.history.append(record)
        self.state.totals = Totals()
        self.log.add(record)
        if self.options.save_frequency and epoch % self.options.save_frequency == 0:
            names.append(self.folder.at_epoch(epoch))
        # last.pth comes last: a run that is killed before it makes the other files again.
        self._save(*names, "last.pth")

    def _record(self, epoch: int) -> dict:
        totals = self.state.totals
        seconds = max(totals.seconds, 1e-9)
        lr = lr_at(self.state.step - 1, self.steps_per_epoch, self.options)
        record = {
            "epoch": epoch, "step": self.state.step, "lr": lr,
            "loss_loc": totals.loss_loc / totals.steps,
            "loss_conf": totals.loss_conf / totals.steps,
            "images_per_second": round(totals.images / seconds, 2), "seconds": round(seconds, 2),
            "waiting_for_data": round(totals.waited / seconds, 3),
        }
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            record["gpu_memory_gib"] = round(peak / 2**30, 2)
            torch.cuda.reset_peak_memory_stats(self.device)
        LOGGER.info("epoch %d: loss %.4f (location %.4f, confidence %.4f), lr %.3g, %.1f img/s, "
                    "%.0f %% of the time waiting for data", epoch,
                    record["loss_loc"] + record["loss_conf"], record["loss_loc"],
                    record["loss_conf"], record["lr"], record["images_per_second"],
                    100 * record["waiting_for_data"])
        speed = ("images_per_second", "waiting_for_data", "gpu_memory_gib")
        self.trackers.scalars(self.state.step, {key: record[key] for key in speed if key in record})
        return record

    def _evaluate(self, name: str) -> dict:
        """Score the present weights; return the part of the results that the run's log keeps."""
        # Processes that score together cannot leave one by one: they stop at the next step.
        alone = self.world.size == 1
        net = self._tested_net()
        self.world.share_statistics(net)
        self.testing = alone
        results = self.evaluate(net, name, lambda images: self.stop.check() if alone else None)
        self.testing = False
        step = self.evaluated_at = self.state.step
        if results is None:
            return {}
        value, metric = results["value"], results["metric"]
        if value is not None and value > self.state.best.get("value", -1):
            self.state.best = {"step": step, "value": value, "metric": metric}
        self.trackers.scalars(step, {metric: value})
        if self.options.send_images_to_visdom:
            self.trackers.image(step, "detections", self.evaluate.draw)
        return {key: results[key] for key in ("metric", "value", "per_class")}

    # ------------------------------------------------------------ state

    def _save(self, *names: str) -> None:
        self._read(0)
        if not self.world.main:
            return
        state = {
            "model": self._tested_net().state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.train_step.scaler.state_dict(), "rng": rng_state(),
            **asdict(self.state), "classes": list(self.options.classes),
            "config": self.options.plain(), "data": self.data,
            "test_data": self.test_data,
        }
        if self.average:
            state["raw_model"] = self.net.state_dict()
            state["average_updates"] = self.average.updates
        try:
            self.folder.save(state, *names)
        except UserError:
            self.consistent = False  # last.pth alone would say that the others were made
            raise
        self.saved_at = time.monotonic()

    def _tested_net(self) -> nn.Module:
        """The network that is tested and handed on: the average, where the run has one."""
        return self.average.net if self.average else self.net
