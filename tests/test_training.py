"""Laws while a model trains: curves in TensorBoard's file, what happened between two looks, a
broken theorem, and the time that it takes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import streamgauge
from streamgauge.errors import StreamgaugeError
from streamgauge.numerics.rows import Prompts
from streamgauge.training import Watch
from streamgauge.verdicts import scalars, verdicts
from tests import models
from tests.records import sound_record

ROWS = Prompts([[1, 5, 9, 2, 77, 31, 4, 8], [3, 8, 1, 60, 22, 9, 9, 14]], "test", None, True)


class Sequences(torch.utils.data.Dataset):
    """Sequences that can be learnt: each token is the one before it plus one."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + n) % 97
        return {"input_ids": ids, "labels": ids}


class Damage(tf.TrainerCallback):
    """Changes a weight by hand behind one step."""

    def __init__(self, step: int, change: Any) -> None:
        self.step, self.change = step, change

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(given["model"])


def trained(folder: Path, damage: Damage | None, steps: int, **options: Any) -> Any:
    """A trainer that ran, and the callback that looked."""
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, save_strategy="no",
        report_to=["tensorboard"], logging_steps=10, use_cpu=True, disable_tqdm=True,
        learning_rate=1e-3, seed=0,
    )  # fmt: skip
    trainer = tf.Trainer(models.random_model("gpt2"), arguments, train_dataset=Sequences())
    if damage:
        trainer.add_callback(damage)
    callback = streamgauge.TrainerCallback(trainer, rows=ROWS, **options)
    trainer.add_callback(callback)
    trainer.train()
    return callback


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Curves of TensorBoard's event file by name: (step, value)."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))

    def read() -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = (tmp_path / "runs").rglob("events.*")
        found = EventAccumulator(str(file))
        found.Reload()
        return {
            name: [(one.step, one.value) for one in found.Scalars(name)]
            for name in found.Tags()["scalars"]
        }

    return read


def test_a_norm_scaled_by_hand_is_seen_at_the_next_look(events: Any, tmp_path: Path) -> None:
    def scale(model: Any) -> None:
        model.transformer.h[1].ln_2.weight.mul_(3)

    with pytest.warns(UserWarning, match="step 30: damaged.*ln_2.weight"):
        callback = trained(tmp_path / "out", Damage(25, scale), 40, every=10, share=1.0)
    assert [look.step for look in callback.looks] == [10, 20, 30, 40]
    assert [look.is_training for look in callback.looks] == [True, True, False, True]
    curves = events()
    name = next(name for name in curves if name.endswith("streamgauge/explained_by_training"))
    assert curves[name] == [(10, 1.0), (20, 1.0), (30, 0.0), (40, 1.0)]
    growth = next(
        values for name, values in curves.items() if name.endswith("residual/growth_rate")
    )
    assert [step for step, _ in growth] == [10, 20, 30, 40]
    assert np.isfinite([value for _, value in growth]).all()
    # The trainer's own losses of these very steps are there, too.
    losses = next(own for name, own in curves.items() if name in ("train/loss", "loss"))
    assert [step for step, _ in losses][:4] == [10, 20, 30, 40]
    share = next(values for name, values in curves.items() if name.endswith("share_of_time"))
    assert 0 < share[-1][1] <= 1
    kept = sorted((tmp_path / "out" / "streamgauge").iterdir())
    assert [path.stem for path in kept] == ["step-10", "step-20", "step-30", "step-40"]
    record = streamgauge.Record.load(kept[2])
    np.testing.assert_array_equal(record.resid_pre, callback.looks[2].record.resid_pre)


def test_looks_take_no_more_than_their_share(tmp_path: Path) -> None:
    callback = trained(tmp_path / "out", None, 60, every=5, share=0.01)
    assert len(callback.looks) == 1  # and the next would not fit into a hundredth of the time


def test_a_look_that_fails_costs_no_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("streamgauge.training.measure", full)
    monkeypatch.setattr(tf.Trainer, "push_to_hub", full)
    with pytest.warns(UserWarning, match="step 10: no space left"):
        callback = trained(tmp_path / "out", None, 40, every=10, share=1e-9)
    assert not callback.looks and callback.trainer.state.global_step == 40
    assert callback._tried == 1  # what fails takes its share as well


def test_a_broken_theorem_ends_the_training_where_that_is_asked(tmp_path: Path) -> None:
    def spoil(model: Any) -> None:
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")

    with pytest.warns(UserWarning, match="training ends: .*NaN"):
        callback = trained(tmp_path / "out", Damage(15, spoil), 60, every=10, share=1.0, stop=True)
    assert [look.step for look in callback.looks] == [10, 20]
    assert callback.trainer.state.global_step == 20


def test_a_loop_of_one_s_own(tmp_path: Path) -> None:
    model, watch = models.random_model("llama"), Watch(tmp_path / "records", ROWS)
    first = watch.look(model.save_pretrained, step=0)
    assert first.since is None and first.is_training and not first.broken
    again = watch.look(model.save_pretrained, step=1)
    assert again.since is not None and again.since.startswith("identical")
    assert set(first.scalars) >= {"streamgauge/residual/growth_rate"}
    with pytest.raises(StreamgaugeError, match="is not a folder with a checkpoint"):
        watch.look(lambda folder: None, step=2)


def test_verdicts_are_those_of_an_audit() -> None:
    rows = verdicts(sound_record(0.99))
    row = next(row for row in rows if row["law"] == "residual/growth_rate")
    assert row["outcome"] == "fail" and row["value"] == pytest.approx(0.99)
    numbers = scalars(rows)
    assert numbers["streamgauge/residual/growth_rate"] == pytest.approx(0.99)
    assert numbers["streamgauge/margin/residual/growth_rate"] == pytest.approx(-0.01, rel=1e-3)
    kinds = {row["law"] for row in verdicts(sound_record(), sound_record())}
    assert "regression/verdict" in kinds
