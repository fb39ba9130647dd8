"""One training run: the loop over epochs, its record on the disk, and how it is interrupted."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.checkpoint import load_weights, rng_state, save_checkpoint, set_rng_state
from utils.engine import NonFiniteLoss, train_steps
from utils.errors import UserError
from utils.logger import LOGGER, Progress, RunLog
from utils.optimization import MovingAverage, parameter_groups


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived."""


class Trainer:
    """Trains ``net`` in place; everything that it needs is given to it.

    Args:
        net: maps images to (loc, conf), on its device.
        criterion: maps ((loc, conf), priors, targets) to two losses.
        priors: [P, 4] on the device.
        loader: its batches (images, targets, indices) of an epoch follow
            ``loader.batch_sampler.set_epoch(epoch, start)``.
        learning_rate: of a step, 0-based and counted over the whole run.
        evaluate: called as evaluate(net, name, on_batch) when an evaluation is due; returns
            results with "metric", "value" and "per_class". None: there is nothing to test on.
        options: the configuration: amp, lr, momentum, weight_decay, max_epoch, ngpu,
            save_frequency, test_frequency, log_iters, visdom, send_images_to_visdom, version,
            dataset.
        identity: what every checkpoint carries beside the state: classes, config, data.
        mean: of the input's channels.
        directory: the run's folder.
        image_name: of a data-set index, for messages.
    """

    def __init__(
        self,
        net: nn.Module,
        criterion: nn.Module,
        priors: Tensor,
        loader,
        learning_rate: Callable[[int], float],
        evaluate: Callable[[nn.Module, str, Callable[[int], None]], dict] | None,
        options: dict,
        identity: dict,
        mean: Sequence[float],
        directory: Path,
        image_name: Callable[[int], str],
    ):
        self.net = net
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
        self.optimizer = torch.optim.SGD(
            parameter_groups(net, options["weight_decay"], options["norm_decay"]),
            lr=options["lr"],
            momentum=options["momentum"],
        )
        self.average = MovingAverage(net, options["ema"]) if options["ema"] else None
        self.scaler = torch.amp.GradScaler(priors.device.type, enabled=options["amp"] == "fp16")
        self.steps_per_epoch = len(loader.batch_sampler)
        self.step = 0
        self.history: list[dict] = []
        self.totals = self._no_totals()
        self.evaluated_at = -1
        # Whether the state is that after `step` whole steps, so that it may be saved.
        self.consistent = True
        self.stop = False

    def restore(self, saved: dict, path: Path) -> None:
        """Go on exactly where the checkpoint ``saved``, read from ``path``, was made."""
        load_weights(self.net, saved.get("raw_model", saved["model"]), path)
        try:
            if self.average:
                load_weights(self.average.net, saved["model"], path)
                self.average.updates = int(saved["average_updates"])
            self.optimizer.load_state_dict(saved["optimizer"])
            # The configuration in force decides: an option may have been given anew.
            for number, group in enumerate(self.optimizer.param_groups):
                group["momentum"] = self.options["momentum"]
                group["weight_decay"] = 0.0 if number else self.options["weight_decay"]
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            set_rng_state(saved["rng"])
            self.step = int(saved["step"])
            self.history = list(saved["history"])
            self.totals = {key: saved["totals"][key] for key in self.totals}
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
        self.log = RunLog(self.directory, self.history, self.options["visdom"])
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._train(end)
        except NonFiniteLoss as error:
            names = ", ".join(self.image_name(i) for i in error.indices)
            raise UserError(
                f"the loss is not finite at step {self.step} ({error}; lr "
                f"{self.learning_rate(self.step):.3g}); {self._kept()}; check the boxes of the "
                f"batch, or lower --lr; its pictures: {names}"
            ) from error
        except BaseException:
            # A dead worker or a vanished picture costs nothing; a failure inside a step costs the
            # steps since the last checkpoint, as nobody knows how far it came.
            if self.consistent:
                self._save("last.pth")
                LOGGER.info(
                    "stopped at step %d; go on with --resume %s", self.step, self._path("last.pth")
                )
            raise
        finally:
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------ the loop

    def _train(self, end: int) -> None:
        net = self.net
        if self.options["ngpu"] > 1:
            net = nn.DataParallel(net, list(range(self.options["ngpu"])))
        if self.totals["steps"] and self.step % self.steps_per_epoch == 0:
            self._finish_epoch()  # it was interrupted between its last step and its record
        while self.step < end:
            self._train_epoch(net, end)
            if self.step % self.steps_per_epoch == 0:
                self._finish_epoch()
        if self.evaluate and self.evaluated_at != self.step:
            self.log.add({"step": self.step, **self._evaluate("final")})
        final = f"Final_{self.options['version']}_{self.options['dataset']}.pth"
        self._save("last.pth", final)
        LOGGER.info("done: %s", self._path(final))

    def _train_epoch(self, net: nn.Module, end: int) -> None:
        epoch, start = divmod(self.step, self.steps_per_epoch)
        self.loader.batch_sampler.set_epoch(epoch, start)
        label = f"epoch {epoch + 1}/{self.options['max_epoch']}"
        progress = Progress(label, self.steps_per_epoch, self.options["log_iters"], start)
        before, began = self.totals["seconds"], time.monotonic()
        steps = train_steps(
            net,
            self.criterion,
            self.priors,
            self._batches(min(end - self.step, self.steps_per_epoch - start)),
            self.optimizer,
            self.scaler,
            map(self.learning_rate, itertools.count(self.step)),
            self.mean,
            self.options["amp"],
            self.options["clip_norm"],
        )
        try:
            for done in steps:
                self.step += 1
                if self.average:
                    self.average.update(self.net)
                losses = {"loss_loc": done.loss_loc, "loss_conf": done.loss_conf}
                for key, value in losses.items():
                    self.totals[key] += value
                self.totals["steps"] += 1
                self.totals["images"] += len(done.images)
                self.totals["seconds"] = before + time.monotonic() - began
                self.consistent = True
                shown = {"loss": sum(losses.values()), **losses, "lr": done.lr}
                progress.update(len(done.images), **shown)
                self.log.scalars(self.step, shown)
                if self.options["send_images_to_visdom"] and progress.done == start + 1:
                    self.log.images(self.step, "training pictures", done.images[:8].flip(1))
                self._check_signal()
        finally:
            progress.close()

    def _batches(self, count: int) -> Iterator:
        """``count`` batches of the loader, keeping track of whether a step is under way."""
        iterator = iter(self.loader)
        for _ in range(count):
            batch = next(iterator)
            self.consistent = False
            yield batch

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
        if self.evaluate and epoch % options["test_frequency"] == 0:
            # Saved before, too: an evaluation may take long, and may be interrupted.
            self._save("last.pth")
            record |= self._evaluate(f"epoch_{epoch}")
        self.history.append(record)
        self.totals = self._no_totals()
        self.log.add(record)
        names = ["last.pth"]
        if options["save_frequency"] and epoch % options["save_frequency"] == 0:
            names.append(f"{options['version']}_{options['dataset']}_epoches_{epoch}.pth")
        self._save(*names)

    def _evaluate(self, name: str) -> dict:
        """Score the present weights; returns what of it belongs into the run's log."""
        results = self.evaluate(self._best_known(), name, lambda images: self._check_signal())
        self.evaluated_at = self.step
        self.log.scalars(self.step, {results["metric"]: results["value"]})
        return {key: results[key] for key in ("metric", "value", "per_class")}

    # ------------------------------------------------------------ state

    @staticmethod
    def _no_totals() -> dict[str, float]:
        """Sums over the steps of an epoch so far; part of the state."""
        return {"loss_loc": 0.0, "loss_conf": 0.0, "steps": 0, "images": 0, "seconds": 0.0}

    def _save(self, *names: str) -> None:
        state = {
            "model": self._best_known().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "totals": self.totals,
            "history": self.history,
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
            save_checkpoint(self._path(name), state)

    def _best_known(self) -> nn.Module:
        """The network that is tested and handed on: the average, where there is one."""
        return self.average.net if self.average else self.net

    def _kept(self) -> str:
        last = self._path("last.pth")
        return f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _on_signal(self, number: int, _) -> None:
        """First signal: stop after the present step. A second one acts at once."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)

    def _check_signal(self) -> None:
        if self.stop:
            raise Interrupted
