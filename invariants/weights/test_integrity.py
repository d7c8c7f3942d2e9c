"""The weights are all there and all used: finite, no head or layer dead, no two layers the same, a
row for each token.

Counts of tensors that hold NaN or Inf, of block matrices that are all zero, of ranges of equal
numbers in matrices, as pages that were not written leave them, of heads with ‖W_OV‖ = 0, of block
matrices that equal the same matrix of another layer, of tensors in the files' blocks that the
configuration leaves no place for, of tokenizers with ids beyond the embedding, of heads that differ
from the embedding that the configuration ties them to, and of pickled weights beside the
safetensors that hold other numbers. All must be zero.
Source: no trained checkpoint has these; conversions, merges and truncated copies do.
Applies to: every checkpoint.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.record import Record

NONE = below(0.5, "none in a sound checkpoint")
FAULTS = {
    "not_finite": "tensors that are not finite",
    "dead": "matrices that are all zero",
    "runs": "ranges of equal numbers that are no whole rows",
    "alike": "matrices that repeat",
    "unread": "tensors that the model has no place for",
    "tokenizer": "tokens without a row in the embedding",
    "untied": "heads that differ from the embedding they are tied to",
    "beside": "files beside that hold other weights",
}


@pytest.mark.theorem
def test_integrity(record: Record, check) -> None:
    for fault, what in FAULTS.items():
        found = record.integrity.get(fault, [])  # older records did not look for all of them
        check(len(found), within=NONE, what=what, of="; ".join(found[:3]) or "all tensors")
    # A record without W_OV still has its tensors checked; why it is missing stands in its metadata.
    heads = np.argwhere(record.arrays.get("weights/W_OV_frobenius", np.ones((1, 1))) == 0)
    where = ", ".join(f"layer {layer} head {head}" for layer, head in heads[:3])
    check(len(heads), within=NONE, what="heads with ‖W_OV‖ = 0", of=where or "all heads")
