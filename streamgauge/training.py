"""Laws while a model trains: a callback for transformers' Trainer, and the same for a loop of one's
own.
"""

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from streamgauge.compare import differences, judge
from streamgauge.measure import measure
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record
from streamgauge.verdicts import scalars, verdicts

# What is measured at each look: a few forward passes over the prompts.
LOOKED_AT = ("instrument", "stream", "weights", "neurons", "sublayers", "prediction", "sketch")


@dataclass(frozen=True)
class Look:
    """What was seen at a step: the record, the laws' rows, what became of the model since the look
    before in one sentence (None at the first), and whether further training explains that.
    """

    step: int
    record: Record
    rows: list[dict[str, Any]]
    since: str | None
    is_training: bool

    @property
    def scalars(self) -> dict[str, float]:
        """Values and margins of laws by `streamgauge/law`."""
        return scalars(self.rows) | {"streamgauge/explained_by_training": float(self.is_training)}

    @property
    def broken(self) -> list[str]:
        """The reasons of theorems that fail."""
        wrong = [r for r in self.rows if r["kind"] == "theorem" and r["outcome"] == "fail"]
        return [str(row["reason"]) for row in wrong]


class Watch:
    """Looks at a model that is being trained, and keeps a record of each look in a folder.

    rows: token ids to measure on, else the built-in prompts by the tokenizer that is saved beside
    the model. groups: what is measured.

    >>> watch = Watch(Path("records"))  # doctest: +SKIP
    >>> look = watch.look(lambda to: model.save_pretrained(to), step=500)  # doctest: +SKIP
    """

    def __init__(
        self, folder: Path, rows: Prompts | None = None, groups: tuple[str, ...] = LOOKED_AT
    ) -> None:
        self.folder, self.rows, self.groups = folder, rows, groups
        self._last: Record | None = None

    def look(self, save: Callable[[Path], Any], step: int) -> Look:
        """Measure what `save` writes into the folder that it is given: config.json, safetensors
        and, where text is to be read, a tokenizer. Raises StreamgaugeError.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / f"step-{step}"
            save(folder)
            record = measure(folder, rows=self.rows, groups=self.groups, neighbours="none", draws=0)
        record.save(self.folder / f"step-{step}.safetensors")
        since, is_training = None, True
        if self._last is not None:
            found = judge(self._last, record, differences(self._last, record))
            since, is_training = found.says, found.passes("trained")
        self._last = record
        return Look(step, record, verdicts(record), since, is_training)


class TrainerCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Measures the model every so many steps, and logs laws' values and margins to whatever the
    trainer logs to (TensorBoard, W&B …). Records go into `streamgauge` in the output folder.

    every: steps between looks. share: of the time of training that looks may take; later ones wait
    until they are that cheap. stop: whether a broken theorem ends the training. rows: token ids to
    measure on instead of the built-in prompts, which need a tokenizer.

    >>> trainer.add_callback(streamgauge.TrainerCallback(trainer, every=200))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Any,
        *,
        every: int = 500,
        share: float = 0.05,
        stop: bool = False,
        rows: Prompts | None = None,
    ) -> None:
        self.trainer, self.every, self.share, self.stop = trainer, every, share, stop
        self.watch = Watch(Path(trainer.args.output_dir) / "streamgauge", rows)
        self.looks: list[Look] = []
        self.seconds, self._tried = 0.0, 0  # that looks took, and how many there were
        self._began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count time from here."""
        self._began, self.seconds, self._tried = time.monotonic(), 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look where it is time to, and where looks were cheap enough so far."""
        if state.global_step % self.every or not self._is_affordable(args.world_size):
            return
        began = time.monotonic()
        try:
            look = self._look(state)
        except Exception as error:  # whatever it is, training goes on
            warnings.warn(f"streamgauge, step {state.global_step}: {error}", stacklevel=1)
            return
        finally:
            self.seconds, self._tried = self.seconds + time.monotonic() - began, self._tried + 1
        if look is None:
            return
        self.looks.append(look)
        share = self.seconds / (time.monotonic() - self._began)
        # Logging says that all was logged; the trainer's own losses may still be due.
        due = control.should_log
        self.trainer.log(look.scalars | {"streamgauge/share_of_time": share})
        control.should_log = due
        if not look.is_training:
            warnings.warn(f"streamgauge, step {look.step}: {look.since}", stacklevel=1)
        if self.stop and look.broken:
            warnings.warn(
                f"streamgauge, step {look.step}, training ends: {look.broken[0]}", stacklevel=1
            )
            control.should_training_stop = True

    def _look(self, state: Any) -> Look | None:
        """A look by the first process; the others only help to save."""
        if state.is_world_process_zero:
            return self.watch.look(self._save, state.global_step)
        with tempfile.TemporaryDirectory() as temporary:
            self._save(Path(temporary))
        return None

    def _is_affordable(self, processes: int) -> bool:
        """Whether another look like those before stays within the share of the time. Several
        processes save together, and so look at every step that it is time to.
        """
        if not self._tried or processes > 1:
            return True
        next_one = self.seconds / self._tried
        return self.seconds + next_one <= self.share * (time.monotonic() - self._began + next_one)

    def _save(self, folder: Path) -> None:
        # With its processing class; said to be a call of its own, it pushes nothing to the hub.
        self.trainer.save_model(str(folder), _internal_call=True)
