"""Open a checkpoint as a plain Hugging Face model whose weights are mapped, not read.

Imports torch inside functions.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError

from streamgauge.checkpoints.files import (
    Checkpoint,
    count_elements,
    stored_dtypes,
    tensor_names,
)
from streamgauge.checkpoints.untrusted import refuse_sizes, strange
from streamgauge.engine.mapped import Mapped
from streamgauge.errors import CheckpointError, first_line
from streamgauge.numerics.names import LAYER, layer_of

BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # which old versions saved
# What parts beside a language model are called.
BESIDE = re.compile(r"vision|visual|image|audio|speech|multi_modal|projector")


@dataclass(frozen=True)
class Opened:
    """A checkpoint's language model.

    unread: names of tensors in the files' blocks that the model has no place for. left_out: in
    words, the parts beside the language model that are not measured; None where there are none.
    """

    mapped: Mapped
    unread: list[str]
    left_out: str | None


def load_model(checkpoint: Checkpoint, device: str) -> Opened:
    """The checkpoint as a plain Hugging Face causal language model that computes in fp32: eager
    attention, eval mode. Its weights are mapped, not read.

    Raises CheckpointError for an architecture that transformers does not know, and for weights that
    do not fill the model that config.json describes.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, auto = _configured(checkpoint)
    refuse_sizes(
        checkpoint.folder / "config.json",
        lambda: auto.from_config(config),
        count_elements(checkpoint),
    )
    dtype = _mapped_dtype(checkpoint)
    model, loading = _fill(checkpoint, auto, config, dtype)
    own = _language_model(model)
    _refuse_missing(checkpoint, [name for name in loading["missing_keys"] if own(name)])
    depth = config.get_text_config().num_hidden_layers
    _refuse_beyond(checkpoint, loading["unexpected_keys"], depth)
    unread = _unread(model, loading["unexpected_keys"])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {name: parameter.data for name, parameter in parameters.items() if own(name)}
    if dtype != torch.float32:
        model = _in_fp32(
            model,
            lambda: auto.from_config(config, dtype=torch.float32, attn_implementation="eager"),
        )
    try:
        mapped = Mapped(model.eval(), stored, device)
    except (RuntimeError, AssertionError) as error:  # what torch raises of a device
        raise CheckpointError(
            f"the device {device!r} cannot be used ({first_line(error)}); name another with "
            "--device."
        ) from error
    left_out = None
    if config.get_text_config() is not config:
        left_out = _say_left_out(tensor_names(checkpoint), stored)
    return Opened(mapped, unread, left_out)


def _configured(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The configuration, and transformers' way to build the language model of it: causal, or one
    that other parts (vision, audio) lie beside.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except strange(OSError) as error:
        raise _unsupported(checkpoint, str(error)) from error
    # Matters of form: transformers' own models cannot do without the first, and collect for nothing
    # what the others ask for.
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    if getattr(config, "rescale_every", 0):
        # RWKV halves weights and stream every few layers so that fp16 does not overflow. fp32 needs
        # none.
        config.rescale_every = 0
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return config, auto
    architectures = getattr(config, "architectures", None)
    listed = architectures if isinstance(architectures, list) else []
    named = next(iter(listed), config.model_type)
    raise _unsupported(checkpoint, f"{named} is not a causal language model")


def _fill(checkpoint: Checkpoint, auto: Any, config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The model with its weights mapped, and what transformers says of names that do not match."""
    try:
        model, loading = auto.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except strange(OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights in {checkpoint.folder} do not fit its config.json ({first_line(error)})."
        ) from error
    return model, loading


def _refuse_missing(checkpoint: Checkpoint, missing: list[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the tensors its config.json asks for, "
            f"{min(missing)} first: "
            "the checkpoint is truncated or its config belongs to another model."
        )


def _refuse_beyond(checkpoint: Checkpoint, unexpected: Iterable[str], depth: int) -> None:
    beyond = [name for name in sorted(unexpected) if (layer_of(name) or 0) >= depth]
    if beyond:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(beyond)} tensors of layers that its config.json does "
            f"not have, {beyond[0]} first: "
            "its config belongs to another model."
        )


def _language_model(model: Any) -> Callable[[str], bool]:
    """Whether a parameter belongs to the language model, for a model that may have other parts."""
    if model.config.get_text_config() is model.config:
        return lambda name: True
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules() if any(module is p for p in parts)]
    return lambda name: any(name.startswith(f"{path}.") for path in paths)


def _say_left_out(in_files: Iterable[str], stored: Iterable[str]) -> str | None:
    """The tensors of a file that belong to what lies beside the language model, by their names."""
    beside = [name for name in set(in_files) - set(stored) if BESIDE.search(name)]
    if not beside:
        return None
    parts = {next(part for part in name.split(".") if BESIDE.search(part)) for name in beside}
    return f"{len(beside)} tensors beside the language model, in {', '.join(sorted(parts))}"


def _mapped_dtype(checkpoint: Checkpoint) -> Any:
    """The dtype that all floating-point tensors are mapped in: the files' own where that is a
    narrow one throughout.

    Tensors of any other dtype than this are converted when the checkpoint is opened, and then lie
    in memory.
    """
    import torch

    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    dtypes = stored_dtypes(checkpoint).items()
    kinds = {dtype for name, dtype in dtypes if "F" in dtype and not name.endswith(BUFFERS)}
    return narrow.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _in_fp32(narrow: Any, make: Callable[[], Any]) -> Any:
    """The model that `make` builds, without weights; its buffers are as they are in fp32, but for
    those that the files hold.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = make()
    kept = narrow.state_dict(keep_vars=True)
    for name, buffer in narrow.named_buffers():
        if name in kept:
            path, _, attribute = name.rpartition(".")
            own = model.get_submodule(path)._buffers
            own[attribute] = buffer.to(own[attribute].dtype)
    return model


def _unread(model: Any, unexpected: Any) -> list[str]:
    """Of the names that the model has no place for those in its own blocks, but for buffers that
    old versions saved.

    A checkpoint with other parts beside the language model has blocks of theirs, which are none of
    ours.
    """
    own = {name[: found.end()] for name in model.state_dict() if (found := LAYER.search(name))}
    inside = [
        name
        for name in sorted(unexpected)
        if (found := LAYER.search(name)) and name[: found.end()] in own
    ]
    return [name for name in inside if not name.endswith(BUFFERS)]


def _unsupported(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"the architecture of {checkpoint.folder} is not supported: {first_line(why)}."
    )


def context_length(config: Any) -> int:
    """How many positions the model has; 2048 where its architecture sets no limit."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    said = (getattr(text, name, None) for name in names)
    return next((int(v) for v in said if v and int(v) > 0), 2048)
