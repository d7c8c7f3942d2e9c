"""What rounding allows: of weights by the two dtypes."""

import numpy as np

from streamgauge.numerics.names import layer_of, part_of
from streamgauge.record import Record

UNIT = {
    "F64": 2.0**-53,
    "F32": 2.0**-24,
    "F16": 2.0**-11,
    "BF16": 2.0**-8,
    "F8_E4M3": 2.0**-4,
    "F8_E5M2": 2.0**-3,
}


SUBNORMAL = 2.0**-25  # largest absolute error of fp16 where numbers are too small for its exponent


FP32 = UNIT["F32"]


def tensor_rounding(old: Record, new: Record) -> dict[str, float]:
    """Largest relative error of each tensor's numbers that the two dtypes explain: one rounding of
    fp32 where they are one. Where one is quantised, that of the tensor as a whole.
    """
    tables = [
        {row["name"]: row for row in record.metadata.get("parameters", [])} for record in (old, new)
    ]
    found: dict[str, float] = {}
    for name, before in tables[0].items():
        after = tables[1].get(name, {})
        # A tensor that the library puts together from several of the file has no dtype of its own.
        if before.get("dtype") is None or after.get("dtype") is None:
            found[name] = _file_rounding(old, new)
        else:
            grids = sum(row.get("rounding", 0.0) for row in (before, after))
            found[name] = _rounding({before["dtype"]}, {after["dtype"]}, grids)
    return found


def _file_rounding(old: Record, new: Record) -> float:
    before, after = (
        {part.strip() for part in str(r.metadata.get("stored_dtype")).split(",")}
        for r in (old, new)
    )
    said = ((r.metadata.get("converted_from") or {}).get("rounding") for r in (old, new))
    return _rounding(before, after, sum(size or 0.0 for size in said))


def _rounding(before: set[str], after: set[str], grids: float) -> float:
    """grids: what rounding to few bits explains of the two, beside their float dtypes."""
    if before == after:
        return FP32
    return max([UNIT.get(dtype, 0.0) for dtype in before | after] + [FP32, grids])


def coarsest(*records: Record) -> float:
    """Unit roundoff of the coarsest float dtype that the files are stored in."""
    dtypes = [part.strip() for r in records for part in str(r.metadata["stored_dtype"]).split(",")]
    return max(UNIT.get(dtype, 0.0) for dtype in dtypes)


def weight_rounding(old: Record, new: Record) -> float:
    """The largest of these, of a whole model; for records without tensors by all dtypes of the
    files.
    """
    return max(tensor_rounding(old, new).values(), default=_file_rounding(old, new))


def layer_rounding(old: Record, new: Record, part: str | None = None) -> np.ndarray:
    """The largest of these by layer, (n_layers,), likewise; of the tensors of one part alone where
    it is named and there are some.
    """
    every = tensor_rounding(old, new)
    by_tensor = {name: size for name, size in every.items() if part == part_of(name)} or every
    if not by_tensor:
        return np.full(old.n_layers, _file_rounding(old, new))
    found = np.full(old.n_layers, FP32)
    for name, size in by_tensor.items():
        layer = layer_of(name)
        if layer is not None:
            found[layer] = max(found[layer], size)
    return found


def subnormal(rounding: float, root_of_size: float, norm: float) -> float:
    """What numbers too small for fp16's exponent add to a tensor's relative error, where another
    dtype was made of it.
    """
    return 0.0 if rounding == FP32 else SUBNORMAL * root_of_size / max(norm, 1e-30)
