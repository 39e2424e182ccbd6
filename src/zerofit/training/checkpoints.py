"""When and what the loop saves, and what it says about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.manifest import step_name
from ..checkpoint.saver import Outcome, Request, Saver, agree
from ..config.schema import Config
from ..config.stages import stage_ending_at
from ..engines.base import Engine
from ..errors import TrainingFailed
from ..planning.plan import Plan
from ..tasks.base import Best, Task
from ..types import SAVE, Batch, Pending, World
from .events import EventLog
from .phases import STATE as FROZEN
from .phases import PhasedEngine
from .probe import probe_loss
from .progress import Display
from .state import Progress

#: After a save that found no room, look this often whether there is some now.
RETRY_SECONDS = 10.0
#: The last checkpoint of a run waits this long for somebody to make room.
FINAL_PATIENCE_SECONDS = 600.0


class Checkpoints:
    """One rank's checkpoints of one run. Methods are collective unless they say otherwise.

    Args:
        task: knows what is best, and what travels with a checkpoint.
        data: fingerprint of the data that is trained on.
        probe: the sample that every checkpoint carries with its loss; the same on every rank.
    """

    def __init__(
        self,
        saver: Saver,
        engine: Engine,
        config: Config,
        plan: Plan,
        world: World,
        task: Task,
        data: dict[str, Any],
        probe: Batch,
        events: EventLog,
        display: Display,
    ) -> None:
        self.saver, self.engine, self.config, self.plan, self.world = saver, engine, config, plan, world
        self.data, self.probe, self.events, self.display = data, probe, events, display
        self.best, self.facts = task.best, task.facts(config)
        #: Where the run ends: the clock or early stopping may end it before ``max_steps``.
        self.last_step = config.max_steps
        self._probed: tuple[int, Pending[float]] | None = None
        self._begun_step: int | None = None
        self._stall_seconds: dict[int, float] = {}
        self._missed = False
        self._look_again = 0.0

    def announce(self, step: int) -> None:
        """Step `step` is on its way and will be saved: start the probe behind it, so that nobody waits for it."""
        self._probed = step, probe_loss(self.engine, self.probe)

    def save(self, progress: Progress) -> bool:
        """Begin to save; with ``save_asynchronously`` training goes on meanwhile. False: there is no room.

        It is ``best`` when the best evaluation so far was at this very step, whatever the save is made for.
        """
        if self._begun_step == progress.step:
            return True
        started = time.perf_counter()
        names = ["latest"]
        names += ["best"] if progress.best_step == progress.step else []
        names += ["final"] if progress.step == self.last_step else []
        stage = stage_ending_at(self.config, progress.step, self.last_step)
        names += [stage] if stage else []
        if self._probed is None or self._probed[0] != progress.step:
            self.announce(progress.step)
        assert self._probed is not None
        state = self._state(progress, self._probed[1].read())
        scalars, inputs = self.engine.scalars(), self.probe.inputs
        begun = self.saver.begin(
            Request(progress.step, scalars, state, inputs, tuple(names)),
            self.engine.fragments(),
            self.engine.hold_updates,
        )
        self._stall_seconds[progress.step] = time.perf_counter() - started
        if begun:
            self._begun_step = progress.step
        else:
            self._miss(progress.step, f"no room for {self.saver.checkpoint_bytes} bytes in {self.saver.root}")
        self.tell()
        return begun

    def save_now(self, progress: Progress, patience_seconds: float, asked_to_stop: Callable[[], bool]) -> None:
        """Save and return when it is durable; tries again for `patience_seconds`, unless somebody asks to stop.

        Raises:
            TrainingFailed: it could not be written; older checkpoints are whole.
        """
        deadline = time.monotonic() + patience_seconds
        while not (self.save(progress) and self.finish()):
            if not agree(time.monotonic() < deadline and not asked_to_stop(), self.world):
                raise TrainingFailed(
                    f"Step {progress.step} could not be saved in {self.saver.root} (see the warning above). Older "
                    f"checkpoints are whole. Make room and continue with --resume."
                )
            until = time.monotonic() + RETRY_SECONDS
            while time.monotonic() < until and not asked_to_stop():
                time.sleep(0.1)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step lies. Not collective."""
        return self.saver.root / step_name(step)

    def finish(self) -> bool:
        """Wait for the save under way, and tell what became of it. False when it failed."""
        fine = self.saver.finish()
        if not fine:
            self._begun_step = None  # on every rank, so that all try again, or none
        self.tell()
        return fine

    def wishes(self) -> int:
        """`types.SAVE` when a save was missed and there is room again; the main rank's to say. Not collective."""
        if not (self.world.is_main and self._missed) or time.monotonic() < self._look_again:
            return 0
        self._look_again = time.monotonic() + RETRY_SECONDS
        return SAVE if self.saver.has_room() else 0

    def tell(self) -> None:
        """Write what became of saves to the events; never waits. Not collective."""
        for outcome in self.saver.told():
            if outcome.folder is None:
                self._miss(outcome.step, outcome.failure or "")
            else:
                self._tell_saved(outcome)

    def _tell_saved(self, outcome: Outcome) -> None:
        self._missed = False
        self.events.write(
            "checkpoint",
            step=outcome.step,
            folder=outcome.folder,
            seconds=outcome.seconds,
            stall_seconds=self._stall_seconds.pop(outcome.step, None),
            size_bytes=outcome.size_bytes,
            removed=list(outcome.removed),
        )

    def _miss(self, step: int, reason: str) -> None:
        """Note a checkpoint that is not there; say so once until one succeeds."""
        if not self._missed:
            message = (
                f"step {step} was not saved: {reason}. Training goes on; older checkpoints are whole, and it is saved "
                f"again when there is room"
            )
            self.events.write("warning", step=step, message=message)
            self.display.say(f"Warning: {message}.")
        self._missed = True
        self._look_again = time.monotonic() + RETRY_SECONDS

    def _state(self, progress: Progress, loss: float) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "model": self.plan.model.model_dump(mode="json"),
            "facts": self.facts,
            FROZEN: isinstance(self.engine, PhasedEngine) and self.engine.frozen,
            "strategy": self.plan.strategy,
            "offload": self.plan.offload,
            "world_size": self.plan.world_size,
            "precision": self.plan.precision,
            "global_batch": self.plan.global_batch,
            "data_path": str(next(iter(self.config.data.folders().values()))),
            "data": self.data,
            "metrics": progress.metrics,
            "metrics_step": progress.metrics_step,
            "best_metric": self.best.metric,
            "best_highest": self.best.highest,
            "best_value": progress.best_value,
            # The same under its older name, where it is a loss: formats of other programs have a place for it.
            "best_loss": progress.best_value if self.best == Best("val_loss") else None,
            "best_step": progress.best_step,
            "skips_in_a_row": progress.skips_in_a_row,
            "train_seconds": progress.train_seconds,
            "watched_best": progress.watched_best,
            "evaluations_without_improvement": progress.evaluations_without_improvement,
            "probe_loss": loss,
            "zerofit": __version__,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
