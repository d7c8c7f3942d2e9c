"""Computations that run side by side give what they give alone, whatever goes wrong in one of
them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from streamgauge.engine.blockwise import grouped
from streamgauge.engine.forward import PromptRun, walk
from streamgauge.engine.layout import probe_layout
from streamgauge.engine.together import run_together
from streamgauge.errors import CheckpointError
from streamgauge.groups.stream import StreamMeter
from streamgauge.numerics.rows import Prompts
from tests import models


class Tasks:
    """Two maps with an activation between them, on inputs of several shapes; who did what when is
    written down.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.maps = nn.Linear(8, 32), nn.Linear(32, 8)
        self.inputs = [torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(1, 7, 8)]
        self.said: list[tuple[int, str]] = []
        self.at = -1

    def run(self, task: Callable[[int], Any]) -> None:
        def tell(number: int) -> None:
            self.at = number

        with torch.no_grad():
            run_together([lambda n=n: task(n) for n in range(len(self.inputs))], self.maps, tell)

    def alone(self, number: int) -> torch.Tensor:
        self.said.append((number, "in"))
        hidden = self.maps[0](self.inputs[number]).tanh()
        self.said.append((number, "hidden"))
        assert self.at == number
        output: torch.Tensor = self.maps[1](hidden)
        return output


def test_each_gets_what_it_gets_alone_and_maps_are_called_once() -> None:
    tasks, found, sizes = Tasks(), {}, []
    tasks.maps[1].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    multiply = tasks.maps[0].forward
    called = tasks.maps[0].forward = lambda x: sizes.append(len(x)) or multiply(x)  # type: ignore[func-returns-value]
    tasks.run(lambda number: found.update({number: tasks.alone(number)}))
    assert tasks.said == [(n, place) for place in ("in", "hidden") for n in range(3)]
    assert sizes == [6 + 5 + 7, 2, 5, 1]  # the first map itself once; hooks on the second by task
    assert tasks.maps[0].forward is called  # what stood there before stands there again
    tasks.maps[0].forward = multiply
    for number, output in found.items():
        tasks.at = number
        torch.testing.assert_close(output, tasks.alone(number))


def test_a_task_that_fails_ends_all() -> None:
    tasks, ended = Tasks(), []

    def task(number: int) -> None:
        try:
            tasks.alone(number)
            if number == 1:
                raise ZeroDivisionError
        finally:
            ended.append(number)

    with pytest.raises(
        ZeroDivisionError
    ) as error:  # which keeps the frames, and what they refer to
        tasks.run(task)
    assert error and sorted(ended) == [0, 1, 2]
    assert all("forward" not in module.__dict__ for module in tasks.maps)


@pytest.mark.parametrize(
    "more",
    [
        lambda tasks, n: n == 2 and tasks.alone(n),
        lambda tasks, n: tasks.maps[n == 1](torch.ones(8)),
    ],
)
def test_tasks_that_call_other_maps_are_refused(more: Callable[[Tasks, int], Any]) -> None:
    tasks = Tasks()

    def task(number: int) -> None:
        tasks.alone(number)
        more(tasks, number)

    with pytest.raises(CheckpointError, match="cannot be followed"):
        tasks.run(task)


def test_maps_in_lists_are_left_to_each_batch() -> None:
    model = models.blockwise(models.planted_gpt2(1.05))
    with model.held(0) as block:
        maps = model.linear_maps(0)
        assert len(maps) == 4  # W_Q, W_K and W_V together, W_O, W_in and W_out
        block.experts = nn.ModuleList([nn.Linear(2, 2)])
        assert model.linear_maps(0) == maps


def test_batches_that_share_products_are_read_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.blockwise(models.planted_gpt2(1.05))
    layout = probe_layout(model)
    rows = [torch.randint(4, 90, (length,)).tolist() for length in (3, 9, 5, 9, 3, 7, 12)]
    prompts = Prompts(rows, "rows", None)

    def read(tokens: int) -> tuple[dict[str, Any], list[int]]:
        meter = StreamMeter(layout, prompts)
        run = PromptRun(model, prompts, [meter])
        with monkeypatch.context() as patched:
            patched.setattr("streamgauge.engine.blockwise.TOGETHER", tokens)
            groups = [
                len(numbers) for numbers in grouped([batch.ids.numel() for batch in run.batches])
            ]
            walk(model, {"prompts": run})
        return meter.found()[0], groups

    (alone, ones), (some, several), (shared, every) = read(1), read(25), read(1000)
    assert ones == [1] * 5 and 1 < len(several) < 5 and every == [5]
    for name, values in alone.items():
        for other in (some, shared):
            torch.testing.assert_close(
                torch.as_tensor(other[name]), torch.as_tensor(values), rtol=1e-5, atol=1e-6
            )
