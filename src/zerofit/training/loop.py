"""The training loop: the schedule says how fast, the loader what, the engine how; events remember."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ..checkpoint.store import open_checkpoint
from ..config.durations import parse_duration
from ..config.schema import Config
from ..config.stages import stage_ending_at
from ..engines.base import Engine
from ..errors import ConfigError, Interrupted, TrainingFailed
from ..models.base import ModelSpec
from ..planning.gpus import match_name
from ..planning.plan import Plan
from ..tasks.base import Loader, Task
from ..types import FINISH, SAVE, STOP, PendingStep, StepResult, World
from .checkpoints import FINAL_PATIENCE_SECONDS, Checkpoints
from .evaluate import Evaluator
from .events import EventLog
from .not_finite import first_bad_layer
from .phases import PhasedEngine
from .progress import Display
from .schedule import learning_rate
from .scorecard import Scorecard
from .signals import StopRequest
from .state import Progress

#: Steps in a row whose gradient is not finite before training gives up.
MOST_SKIPS = 20


class Trainer:
    """One rank's training of one run. Every method that touches the engine is collective."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        spec: ModelSpec[Any],
        task: Task,
        engine: Engine,
        loader: Loader,
        evaluator: Evaluator,
        world: World,
        checkpoints: Checkpoints,
        display: Display,
        events: EventLog,
        stop: StopRequest,
        progress: Progress,
        words: Callable[[], str | None] = lambda: None,
        phases: PhasedEngine | None = None,
    ) -> None:
        self.config, self.plan, self.engine, self.loader = config, plan, engine, loader
        self.evaluator, self.world, self.display, self.events = evaluator, world, display, events
        self.stop, self.progress, self.phases = stop, progress, phases
        self.checkpoints, self.words = checkpoints, words
        self.items, self.best = task.items, task.best
        self.flops_per_item = spec.flops_per_item(plan.model)
        self.peak_flops = _peak_flops(world, plan)
        self.scorecard = Scorecard(plan, world)
        self.mark = self.began = time.perf_counter()
        length = parse_duration(config.duration) if config.duration is not None else None
        self.seconds = length.amount if length is not None and length.unit == "seconds" else None

    def train(self) -> None:
        """Train until ``max_steps``, until the time is over, or until early stopping's patience is.

        Raises:
            Interrupted: asked to stop; a checkpoint was saved first.
            TrainingFailed: the gradient stayed not finite, or the last checkpoint could not be written.
        """
        pending: PendingStep | None = None
        self.mark = self.began = time.perf_counter()
        if self._patience_is_over():
            self._end_at(self.progress.step, "early stopping had ended this run, and its patience is not longer now")
        elif self.seconds is not None and self.progress.train_seconds >= self.seconds:  # as the checkpoint says to all
            self._end_at(self.progress.step, f"the duration {self.config.duration} was over already")
        for step in range(self.progress.step, self.config.max_steps):
            if step >= self.last_step:
                break
            lr = learning_rate(self.config, step)
            wishes = self.stop.wishes | self.checkpoints.wishes() | self._clock_wishes()
            following = self.engine.train_step(self.loader.window(step), lr, step, wishes)
            wishes = self._record(step - 1, pending) if pending else 0
            pending, self.progress.step = following, step + 1
            if wishes & FINISH:
                self._end_at(step + 1, f"the duration {self.config.duration} is over")
            due = self._pause_is_due(step + 1) or bool(wishes)
            if self._save_is_due(step + 1):
                self.checkpoints.announce(step + 1)
            if due or self.world.device.type == "cpu":  # on a CPU the step is done already: nothing to hide
                wishes |= self._record(step, pending)
                pending = None
                if wishes & FINISH and step + 1 < self.last_step:
                    self._end_at(step + 1, f"the duration {self.config.duration} is over")
            if due or wishes:
                self._pause(step + 1, save=bool(wishes & SAVE))
                if wishes & STOP and step + 1 < self.last_step:
                    self._interrupt(step + 1)
                if self._thaw_is_due(step + 1):
                    self._thaw(step + 1)
        self.checkpoints.finish()
        self.events.write("end", step=self.progress.step, **_peaks(self.world))
        self.scorecard.finish(_peaks(self.world), self.events, self.display)
        self._sample(self.progress.step)

    def _pause_is_due(self, done: int) -> bool:
        due = self._evaluation_is_due(done) or self._save_is_due(done) or self._sample_is_due(done)
        return due or self._thaw_is_due(done) or done == self.last_step

    def _pause(self, done: int, save: bool) -> None:
        """Between two steps: evaluate and save what is due or, with `save`, asked for. Its time is not the step's."""
        improved = self._evaluation_is_due(done) and self._evaluate(done)
        self._count_time()
        if self._save_is_due(done) and done == self.last_step:
            self.checkpoints.save_now(self.progress, FINAL_PATIENCE_SECONDS, self._asked_to_stop)
        elif save or self._save_is_due(done) or (improved and self.config.save_on_improvement):
            self.checkpoints.save(self.progress)
        if self._sample_is_due(done):
            self._sample(done)
        self.mark = time.perf_counter()

    def _thaw_is_due(self, done: int) -> bool:
        phases = self.phases
        return phases is not None and phases.frozen and done == phases.thaw_step and done < self.last_step

    def _thaw(self, done: int) -> None:
        """The frozen phase is over: save, build the engine of the whole network, load."""
        assert self.phases is not None
        self.checkpoints.save_now(self.progress, FINAL_PATIENCE_SECONDS, self._asked_to_stop)
        self.phases.thaw(open_checkpoint(self.checkpoints.folder(done)))
        self.events.write("thawed", step=done, strategy=self.plan.strategy)
        self.display.say(f"The whole network trains from step {done + 1} on, with a fresh optimizer.")
        self._count_time()
        self.mark = time.perf_counter()

    def _sample_is_due(self, done: int) -> bool:
        interval = self.config.sample_interval
        return interval != "never" and done % interval == 0 and done < self.last_step

    def _sample(self, done: int) -> None:
        """Show and remember what the model writes. Collective: the number of tokens is the same on every rank."""
        words = self.words()
        if words is not None:
            self.events.write("sample", step=done, text=words)
            at_end = done >= self.last_step
            self.display.say(f"Sample{'' if at_end else f' after step {done}'}:\n{words}")

    def _evaluation_is_due(self, done: int) -> bool:
        interval = self.config.eval_interval
        if interval == "epoch":
            return self._epoch_ends(done) or done == self.last_step
        return interval != "never" and (done % interval == 0 or done == self.last_step)

    def _save_is_due(self, done: int) -> bool:
        interval = self.config.save_interval
        if interval == "never":
            return False
        if done == self.last_step or stage_ending_at(self.config, done):
            return True
        if interval == "evaluation":
            return self._evaluation_is_due(done)
        if interval == "epoch":
            return self._epoch_ends(done)
        return done % interval == 0

    def _epoch_ends(self, done: int) -> bool:
        return self.loader.epoch_of_step(done) > self.loader.epoch_of_step(done - 1)

    def _record(self, step: int, pending: PendingStep) -> int:
        """Write what became of `step`; returns the agreed wishes. Waits for that step, not for the one after."""
        result = pending.read()
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        items_per_second = result.weight / seconds
        event = {
            "step": step + 1,
            "loss": result.loss,
            "learning_rate": learning_rate(self.config, step),
            "grad_norm": result.grad_norm,
            "step_seconds": seconds,
            f"{self.items}_per_second": items_per_second,
            "mfu": self._mfu(items_per_second),
            "loss_scale": result.loss_scale,
            "skipped": result.skipped,
            f"valid_{self.items}": result.weight,
            "epoch": self.loader.epoch_of_step(step),
            **_peaks(self.world),
        }
        self.events.write("step", **event)
        if self.phases is None or not self.phases.frozen:  # the plan's step is one of the whole network
            self.scorecard.step(seconds)
        self.display.step(step + 1, {**event, "metrics": self.progress.metrics})
        self.checkpoints.tell()
        self._watch(step + 1, result)
        return result.wishes

    def _mfu(self, items_per_second: float) -> float | None:
        if self.peak_flops is None:
            return None
        # Of a frozen backbone there is a forward pass alone; the head's gradients count for nothing beside it.
        share = 1 / 3 if self.phases is not None and self.phases.frozen else 1.0
        return items_per_second * share * self.flops_per_item / (self.peak_flops * self.world.world_size)

    def _watch(self, step: int, result: StepResult) -> None:
        """Count skipped steps; the same on every rank, so that all give up together."""
        skipped = result.skipped
        self.progress.skips_in_a_row = self.progress.skips_in_a_row + 1 if skipped else 0
        if skipped:
            where = self._where(step, result)
            self.events.write(
                "warning", step=step, message=f"gradient not finite; the step was skipped{where and f': {where}'}"
            )
        if self.progress.skips_in_a_row >= MOST_SKIPS:
            raise TrainingFailed(
                f"The gradient was not finite for {MOST_SKIPS} steps in a row, up to step {step}"
                f"{where and f': {where}'}. Usual causes: the "
                f"learning rate is too high, fp16 overflows (try bf16 or fp32), or the data is broken. Resume from "
                f"the last checkpoint with a lower learning rate."
            )

    def _where(self, step: int, result: StepResult) -> str:
        """In words, which layer is the first whose values are not finite; looked for at the first skip in a row and at
        the last. Collective. A loss scale that overflows is no fault of a layer."""
        if math.isfinite(result.loss) and self.plan.precision == "fp16":
            return ""
        if self.progress.skips_in_a_row not in (1, MOST_SKIPS):
            return ""
        found = first_bad_layer(self.engine, self.loader.window(step - 1), self.world)
        words = found or "every layer's values are finite in the forward pass"
        self.display.say(f"step {step}: the gradient is not finite: {words}")
        return words

    def _evaluate(self, done: int) -> bool:
        """Evaluate, tell, and say whether this is the best so far (`tasks.base.Best`)."""
        started = time.perf_counter()
        metrics = self.evaluator.evaluate(self.engine)
        epoch = self.loader.epoch_of_step(done - 1)
        self.events.write("eval", step=done, epoch=epoch, **metrics, eval_seconds=time.perf_counter() - started)
        self.progress.metrics, self.progress.metrics_step = metrics, done
        improved = self.best.better(metrics[self.best.metric], self.progress.best_value)
        self.display.evaluation(done, metrics, improved)
        if improved:
            self.progress.best_value, self.progress.best_step = metrics[self.best.metric], done
        self._watch_metric(done, metrics)
        return improved

    @property
    def last_step(self) -> int:
        """Where the run ends, as far as is known; the same on every rank."""
        return self.checkpoints.last_step

    def _end_at(self, done: int, reason: str) -> None:
        """End the run after `done` steps: its last evaluation and its final checkpoint are those of that step."""
        self.checkpoints.last_step = done
        self.events.write("ending", step=done, reason=reason)
        self.display.say(f"Ending at step {done}: {reason}.")

    def _clock_wishes(self) -> int:
        """`types.FINISH` when the main rank's clock says that the duration is over; other ranks have no clock."""
        if self.seconds is None or not self.world.is_main:
            return 0
        self._count_time()
        return FINISH if self.progress.train_seconds >= self.seconds else 0

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.progress.train_seconds += now - self.began
        self.began = now

    def _watch_metric(self, done: int, metrics: dict[str, float]) -> None:
        """Early stopping: the same metrics, and so the same decision, on every rank.

        Raises:
            ConfigError: no evaluated metric has that name.
        """
        watch, progress = self.config.early_stopping, self.progress
        if watch.patience is None:
            return
        if watch.metric not in metrics:
            raise ConfigError(
                f"early_stopping.metric {watch.metric}: an evaluation of this run has {', '.join(metrics)}. Name one "
                f"of those."
            )
        if self.phases is not None and self.phases.frozen:
            return  # a head that has learnt what it can says nothing of the whole network, which comes next
        value = metrics[watch.metric] if watch.better == "min" else -metrics[watch.metric]
        first = progress.watched_best is None and math.isfinite(value)  # nothing is better than NaN
        if first or (progress.watched_best is not None and value < progress.watched_best - watch.min_delta):
            progress.watched_best, progress.evaluations_without_improvement = value, 0
            return
        progress.evaluations_without_improvement += 1
        if self._patience_is_over() and done < self.last_step:
            count = progress.evaluations_without_improvement
            self._end_at(done, f"{watch.metric} has not improved in {count} evaluations")

    def _patience_is_over(self) -> bool:
        patience = self.config.early_stopping.patience
        return patience is not None and self.progress.evaluations_without_improvement >= patience

    def _asked_to_stop(self) -> bool:
        return bool(self.stop.wishes & STOP)

    def _interrupt(self, done: int) -> None:
        self.checkpoints.save_now(self.progress, 0, self._asked_to_stop)
        self.events.write("interrupted", step=done)
        raise Interrupted(f"Stopped at step {done} on request and saved. Continue with --resume.")


def _peaks(world: World) -> dict[str, int]:
    """Highest memory so far, in bytes: PyTorch's allocator on a GPU, and this process on the host."""
    peaks = {"host_peak_bytes": _host_peak_bytes()}
    if world.device.type == "cuda":
        peaks["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(world.device)
        peaks["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(world.device)
    return peaks


def _host_peak_bytes() -> int:
    """Peak resident size of this process; 0 on Windows, which has no getrusage."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak_flops(world: World, plan: Plan) -> float | None:
    """The data sheet's dense peak of this rank's GPU, for the MFU figure; None for GPUs in no table."""
    if world.device.type != "cuda":
        return None
    kind = match_name(torch.cuda.get_device_name(world.device))
    return kind.matrix_flops(plan.precision) if kind else None
