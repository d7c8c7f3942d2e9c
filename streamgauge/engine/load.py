"""Open a checkpoint as a plain Hugging Face model whose weights are mapped, not read.

Imports torch inside functions.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError

from streamgauge.checkpoints.contents import why_unfit
from streamgauge.checkpoints.files import (
    Checkpoint,
    count_elements,
    named_in_vain,
    stored_dtypes,
    stored_shapes,
    tensor_names,
)
from streamgauge.checkpoints.untrusted import refuse_sizes, strange
from streamgauge.engine.mapped import Mapped
from streamgauge.errors import CheckpointError, first_line
from streamgauge.numerics.names import BESIDE, LAYER, layer_of

BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # which old versions saved
HEADS = ("lm_head.weight", "embed_out.weight")
FURTHER = re.compile(r"nextn_predict_layers$|^mtp_num.*layers$|^num_mtp.*layers$")


@dataclass(frozen=True)
class Opened:
    """A checkpoint's language model.

    unread: names of tensors in the files' blocks that the model has no place for. left_out: in
    words, the parts beside the language model that are not measured; None where there are none.
    untied: a line where the files hold a head of its own that the configuration ties.
    """

    mapped: Mapped
    unread: list[str]
    left_out: str | None
    untied: list[str]


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
    missing = [name for name in loading["missing_keys"] if own(name)]
    _refuse_missing(checkpoint, auto, config, missing)
    _refuse_beyond(checkpoint, loading["unexpected_keys"], config.get_text_config())
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
    return Opened(mapped, unread, left_out, _untied(mapped, config))


def _untied(mapped: Mapped, config: Any) -> list[str]:
    """One line where the head differs from the embedding that the configuration ties it to."""
    import torch

    embedding, head = mapped.model.get_input_embeddings(), mapped.model.get_output_embeddings()
    places = {id(module): name for name, module in mapped.model.named_modules()}
    names = [f"{places.get(id(module))}.weight" for module in (embedding, head)]
    # Some architectures have a head of their own whatever the configuration says.
    ties = names[1] in (getattr(mapped.model, "_tied_weights_keys", None) or {})
    tied = ties and getattr(config.get_text_config(), "tie_word_embeddings", False)
    if not tied or not set(names) <= set(mapped.stored):
        return []
    one, other = (mapped.stored[name] for name in names)
    if one.data_ptr() == other.data_ptr() or torch.equal(one, other):
        return []
    return [
        f"{names[1]} differs from {names[0]}, which tie_word_embeddings ties it to: transformers 5 "
        "keeps both, older versions drop it"
    ]


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
        why = _why_unfit(checkpoint, auto, config) or first_line(error)
        raise CheckpointError(
            f"the weights in {checkpoint.folder} do not fit its config.json: {why}."
        ) from error
    return model, loading


def _why_unfit(checkpoint: Checkpoint, auto: Any, config: Any) -> str | None:
    """What happened to files that do not fill the model, where names and shapes tell."""
    import torch

    try:
        with torch.device("meta"):
            model = auto.from_config(config)
    except strange():
        return None
    asked = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = stored_shapes(checkpoint)
    # A model with a head knows names of the model without one as its own, and the other way round.
    prefix = f"{model.base_model_prefix}."
    for name in [name for name in held if name not in asked]:
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if other in asked:
            held[other] = held.pop(name)
    quantised = getattr(config, "quantization_config", None) is not None
    return why_unfit(held, asked, quantised)


def _refuse_missing(checkpoint: Checkpoint, auto: Any, config: Any, missing: list[str]) -> None:
    if missing:
        why = (
            _why_unfit(checkpoint, auto, config)
            or _why_missing(checkpoint, missing)
            or "the checkpoint is truncated or its config belongs to another model"
        )
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the tensors its config.json asks for, "
            f"{min(missing)} first: {why}."
        )


def _why_missing(checkpoint: Checkpoint, missing: list[str]) -> str | None:
    """What the index says of missing tensors, or a head that is missing alone."""
    vain = [(name, file) for name, file in named_in_vain(checkpoint) if name in missing]
    if vain:
        return f"its index names {vain[0][0]} in {vain[0][1]}, which does not hold it"
    if len(missing) == 1 and missing[0].endswith(HEADS):
        return (
            "config.json does not tie it to the embedding; where it is that, as writers leave it "
            "that keep shared tensors once, set tie_word_embeddings to true"
        )
    return None


def _refuse_beyond(checkpoint: Checkpoint, unexpected: Iterable[str], config: Any) -> None:
    """Layers that predict further tokens lie beyond the depth, where the configuration says how
    many there are.
    """
    further = sum(
        number
        for name, number in config.to_dict().items()
        if FURTHER.search(name) and isinstance(number, int)
    )
    depth = config.num_hidden_layers + further
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
