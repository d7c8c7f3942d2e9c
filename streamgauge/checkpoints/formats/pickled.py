"""Pickled weights, opened only where the user allows it, and tensors only."""

import shutil
from pathlib import Path

from streamgauge.checkpoints.converted import Origin, Writer, convert_once, texts_beside
from streamgauge.checkpoints.formats.made import SAFETENSORS
from streamgauge.checkpoints.untrusted import PICKLED, TEXTS
from streamgauge.errors import CheckpointError

NAMED = "pytorch_model.bin"
OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "trainer_state")


def pickled_weights(folder: Path) -> list[Path]:
    """The weights that transformers would open: pytorch_model and its parts, or else the only
    pickle there is.

    Raises CheckpointError where there are several.
    """
    named = sorted(path for path in folder.glob("pytorch_model*.bin") if path.is_file())
    others = sorted(path for path in folder.iterdir() if is_pickled(path))
    if not named and len(others) > 1:
        raise CheckpointError(
            f"{folder} has {len(others)} pickled files, {others[0].name} first; call the one "
            f"with weights {NAMED}."
        )
    return named or others


def is_pickled(path: Path) -> bool:
    """Whether a file may hold pickled weights; what a trainer keeps beside them does not."""
    return path.suffix in PICKLED and path.is_file() and not path.name.startswith(OF_TRAINING)


def convert(folder: Path, pickles: list[Path], store: Path) -> tuple[Path, Origin]:
    """A folder in the store with safetensors made of them."""
    beside = texts_beside(folder, TEXTS)

    def make(writer: Writer) -> None:
        for path in pickles:
            _add(path, writer)
        for path in beside:
            shutil.copyfile(path, writer.folder / path.name)

    origin = Origin("pickled", "opened as tensors only", files=tuple(pickles))
    return convert_once(store, folder.name, origin, make, beside), origin


def _add(path: Path, writer: Writer) -> None:
    """Write a file's tensors. Raises CheckpointError for one of anything else."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(
            isinstance(t, torch.Tensor)
            and t.layout == torch.strided
            and not (t.is_complex() or t.is_quantized)
            for t in tensors.values()
        ):
            raise TypeError("not a table of tensors")
    except Exception as error:  # whatever a stranger's pickle makes of it
        raise CheckpointError(
            f"{path} holds more than plain tensors, or is damaged ({type(error).__name__}); "
            "refused."
        ) from None
    for key, tensor in tensors.items():
        name, kind = str(key), str(tensor.dtype).removeprefix("torch.")
        if name in writer.origin.dtypes:
            raise CheckpointError(
                f"{path} holds {name}, which another file of {path.parent} holds too; refused."
            )
        writer.add(name, tensor.detach().clone(), SAFETENSORS.get(kind, kind))
