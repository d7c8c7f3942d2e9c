"""Open a checkpoint as a plain Hugging Face model whose weights are mapped, not read.

Imports torch inside functions.
"""

from collections.abc import Callable
from typing import Any

from streamgauge.checkpoints.files import Checkpoint, count_elements, stored_dtypes
from streamgauge.checkpoints.untrusted import refuse_sizes
from streamgauge.engine.mapped import Mapped
from streamgauge.errors import CheckpointError, first_line
from streamgauge.numerics.names import LAYER, layer_of

BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # which old versions saved


def load_model(checkpoint: Checkpoint, device: str) -> tuple[Mapped, list[str]]:
    """The checkpoint as a plain Hugging Face causal language model that computes in fp32: eager
    attention, eval mode.

    Its weights are mapped, not read. With the names of the tensors in the files' blocks that the
    model has no place for.

    Raises CheckpointError for an architecture that transformers or the bridge does not know, and
    for weights that do not fill the model that config.json describes.
    """
    import torch
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise _unsupported(checkpoint, str(error)) from error
    config.return_dict = True  # a matter of form, and transformers' own models cannot do without
    architectures = getattr(config, "architectures", None)
    named = (
        architectures[0] if isinstance(architectures, list) and architectures else config.model_type
    )
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise _unsupported(checkpoint, f"{named} is not a causal language model")
    architecture = auto._model_mapping[type(config)].__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise _unsupported(checkpoint, f"TransformerLens has no bridge for {architecture}")
    refuse_sizes(
        checkpoint.folder / "config.json",
        lambda: auto.from_config(config),
        count_elements(checkpoint),
    )
    dtype = _mapped_dtype(checkpoint)
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
    except Exception as error:
        raise CheckpointError(
            f"the weights in {checkpoint.folder} do not fit its config.json ({first_line(error)})."
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the tensors its config.json asks for, "
            f"{missing[0]} first: "
            "the checkpoint is truncated or its config belongs to another model."
        )
    depth = config.get_text_config().num_hidden_layers
    beyond = [name for name in sorted(loading["unexpected_keys"]) if (layer_of(name) or 0) >= depth]
    if beyond:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(beyond)} tensors of layers that its config.json does "
            f"not have, {beyond[0]} first: "
            "its config belongs to another model."
        )
    unread = _unread(model, loading["unexpected_keys"])
    stored = {
        name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    if dtype != torch.float32:
        model = _in_fp32(
            model,
            lambda: auto.from_config(config, dtype=torch.float32, attn_implementation="eager"),
        )
    try:
        return Mapped(model.eval(), stored, device), unread
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"the device {device!r} cannot be used ({first_line(error)}); name another with "
            "--device."
        ) from error


def _mapped_dtype(checkpoint: Checkpoint) -> Any:
    """The dtype that all floating-point tensors are mapped in: the files' own where that is a
    narrow one throughout.

    Tensors of any other dtype than this are converted when the checkpoint is opened, and then lie
    in memory.
    """
    import torch

    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    kinds = {
        dtype
        for name, dtype in stored_dtypes(checkpoint).items()
        if "F" in dtype and not name.endswith(BUFFERS)
    }
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
    return next((int(v) for v in (getattr(text, n, None) for n in names) if v), 2048)
