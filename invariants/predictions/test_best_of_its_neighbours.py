"""No change of the checkpoint that undoes what conversions do wrong makes it predict text better.

value = the lowest bound of what a change lowers the loss by at most, nats a token: the mean over
rows of text of (loss with the change - loss as it is) plus Student's t times its standard error, so
that all bounds hold together but for a chance of 1e-3 (see `streamgauge.numerics.neighbours`). A
repair names the fault, unless leaving the sublayer out does better, or the loss is not lowest where
the repair leads to: then the fault is placed and has no name.
Source: a trained model lies where its loss is lowest, so that a change that lowers it undoes a
fault; tried on SmolLM2-135M, of seven faults seven were found and the five that had a repair named.
Applies to: every model that has a tokenizer and text of the kind that it was trained on: that it
predicts better than counting its tokens, as it is or repaired, and about as well as it expects
itself. Faults that cost little (a matrix times 1.1: 0.001 nats) are beyond it.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.neighbours import cause, findings, is_foreign, said, upper_bounds
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_best_of_its_neighbours(record: Record, band: Band, check) -> None:
    said_of = record.metadata["absent"].keys() | record.metadata.keys()
    if "neighbours" not in said_of:
        raise NotApplicable("no change of it was tried (--neighbours none, or an older record)")
    change, error, skew, rows, tokens, layer = (
        record.array(f"neighbours/{name}")
        for name in ("change", "error", "skew", "rows", "tokens", "layer")
    )
    search = record.metadata["neighbours"]
    bounds = upper_bounds(change, error, rows, skew)
    certain = findings(
        search["kinds"], layer, change, np.array([bound not in band for bound in bounds])
    )
    best = min([search["loss"] + change[n] for n in certain], default=search["loss"])
    if best >= search["unigram_loss"]:
        raise NotApplicable(
            f"it predicts {search['text']} no better than counting tokens ({best:.3f} nats against "
            f"{search['unigram_loss']:.3f}), so there is nothing that a fault could have spoiled"
        )
    lines = [
        said(search["kinds"][n], int(layer[n]), change[n], error[n], tokens[n]) for n in certain
    ]
    if certain and search["first"]:
        first, last = certain[0], search["first"]
        if is_foreign(change[first], last["excess"]):
            raise NotApplicable(
                f"{search['text']} is not of the kind that it was trained on (loss "
                f"{best:.3f} nats, {last['excess']:.2f} more than it expects itself), so a change "
                "may lower the loss there by chance; give text of its kind with --prompts"
            )
        other = next((line for lines in record.integrity.values() for line in lines), None)
        lines[0] += ": " + (
            f"the file has another fault, which may be the cause ({other})"
            if other
            else cause(search["kinds"][first], change[first], last["slope"])
        )
    tried = (
        f"{sum(search['tried'].values())} changes, {len(change)} of them raced, on "
        f"{search['tokens']:,} tokens of {search['text']}, loss {search['loss']:.3f}"
    )
    check(
        bounds[certain[0]] if certain else bounds.min(),
        within=band,
        what="certain change of loss by a repair",
        unit="nats a token",
        of=lines[0] if lines else tried,
        details=[*lines, tried],
    )
