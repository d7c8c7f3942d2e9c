"""Open a checkpoint in TransformerLens's raw bridge, and find out what its norms do. Imports torch inside functions."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoint import Checkpoint, count_elements, stored_dtypes
from streamgauge.errors import CheckpointError
from streamgauge.mapped import LAYER, Mapped
from streamgauge.untrusted import refuse_sizes

if TYPE_CHECKING:
    from streamgauge.blockwise import Blockwise

BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # which old versions saved
PROBE_SIZE = 1e3  # large enough that a norm's epsilon does not show in fp32


def load_model(checkpoint: Checkpoint, device: str) -> tuple[Mapped, list[str]]:
    """The checkpoint as a plain Hugging Face causal language model that computes in fp32: eager attention, eval mode.

    Its weights are mapped, not read. With the names of the tensors in the files' blocks that the model has no place for.

    Raises CheckpointError for an architecture that transformers or the bridge does not know, and for weights that do
    not fill the model that config.json describes.
    """
    import torch
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unsupported(checkpoint, str(error)) from error
    config.return_dict = True  # a matter of form, and transformers' own models cannot do without
    architectures = getattr(config, "architectures", None)
    named = architectures[0] if isinstance(architectures, list) and architectures else config.model_type
    auto = transformers.AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise _unsupported(checkpoint, f"{named} is not a causal language model")
    architecture = auto._model_mapping[type(config)].__name__
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise _unsupported(checkpoint, f"TransformerLens has no bridge for {architecture}")
    refuse_sizes(checkpoint.folder / "config.json", lambda: auto.from_config(config), count_elements(checkpoint))
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
            f"the weights in {checkpoint.folder} do not fit its config.json ({_first_line(error)})."
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {len(missing)} of the tensors its config.json asks for, {missing[0]} first: "
            "the checkpoint is truncated or its config belongs to another model."
        )
    depth = config.get_text_config().num_hidden_layers
    beyond = [name for name in sorted(loading["unexpected_keys"]) if (layer_of(name) or 0) >= depth]
    if beyond:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(beyond)} tensors of layers that its config.json does not have, {beyond[0]} first: "
            "its config belongs to another model."
        )
    unread = _unread(model, loading["unexpected_keys"])
    stored = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}
    if dtype != torch.float32:
        model = _in_fp32(model, lambda: auto.from_config(config, dtype=torch.float32, attn_implementation="eager"))
    try:
        return Mapped(model.eval(), stored, device), unread
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"the device {device!r} cannot be used ({_first_line(error)}); name another with --device."
        ) from error


def _mapped_dtype(checkpoint: Checkpoint) -> Any:
    """The dtype that all floating-point tensors are mapped in: the files' own where that is a narrow one throughout.

    Tensors of any other dtype than this are converted when the checkpoint is opened, and then lie in memory.
    """
    import torch

    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    kinds = {dtype for name, dtype in stored_dtypes(checkpoint).items() if "F" in dtype and not name.endswith(BUFFERS)}
    return narrow.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _in_fp32(narrow: Any, make: Callable[[], Any]) -> Any:
    """The model that `make` builds, without weights; its buffers are as they are in fp32, but for those that the files hold."""
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
    """Of the names that the model has no place for those in its own blocks, but for buffers that old versions saved.

    A checkpoint with other parts beside the language model has blocks of theirs, which are none of ours.
    """
    own = {name[: found.end()] for name in model.state_dict() if (found := LAYER.search(name))}
    inside = [name for name in sorted(unexpected) if (found := LAYER.search(name)) and name[: found.end()] in own]
    return [name for name in inside if not name.endswith(BUFFERS)]


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name, None where it has none."""
    found = LAYER.search(f".{name}")
    return int(found.group(1)) if found else None


def _unsupported(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(f"the architecture of {checkpoint.folder} is not supported: {_first_line(why)}.")


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")[:300]


def context_length(config: Any) -> int:
    """How many positions the model has; 2048 where its architecture sets no limit."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((int(v) for v in (getattr(text, n, None) for n in names) if v), 2048)


def build_bridge(model: Any, device: Any = "cpu") -> Any:
    """The raw bridge around a loaded model, which it changes in place; no tokenizer, no weight processing."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with bridging(model):
        return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, device=device)


@contextlib.contextmanager
def bridging(model: Any) -> Iterator[None]:
    """Raises CheckpointError in place of whatever TransformerLens raises where it cannot run a model."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"TransformerLens's bridge cannot run this {type(model).__name__} ({_first_line(error)})."
        ) from error


@dataclass(frozen=True)
class Layout:
    """What the convention needs to know of a model.

    centres: whether the norms that read the stream subtract its mean (LayerNorm). gains, biases: of each block's first
    norm, (n_layers, d_model), ones and zeros where no norm precedes the attention. mlp_gains, mlp_biases: of the norm that
    the MLP reads through, likewise. mlp_norm: that norm's name, ln2 or, in parallel blocks that have but one, ln1; None
    where no norm precedes the MLP. pre_norm: whether blocks add to the stream and leave it otherwise alone. parallel:
    whether attention and MLP both read resid_pre. has_neurons: whether the MLP is one dense layer into another. multiplier:
    what a sublayer's output is multiplied by when the block adds it (Granite).
    """

    centres: bool
    gains: np.ndarray
    biases: np.ndarray
    mlp_gains: np.ndarray
    mlp_biases: np.ndarray
    has_ln1: bool
    mlp_norm: str | None
    pre_norm: bool
    parallel: bool
    has_neurons: bool
    epsilon: float
    multiplier: float

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.gains)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.gains.shape[1])

    def centre(self, x: Any) -> Any:
        """Vectors of the stream in the convention: a tensor minus its mean over the last axis, where norms centre."""
        return x - x.mean(-1, keepdim=True) if self.centres else x


def probe_layout(model: "Blockwise") -> Layout:
    """Find out by trying: norms are run on known vectors, and a block on two tokens. Raises CheckpointError."""
    with bridging(model.mapped.model):
        return _probe_layout(model)


def _probe_layout(model: "Blockwise") -> Layout:
    import torch

    bridge, blocks = model.bridge, model.blocks
    seen = _first_block(model)

    def same(one: str, other: str) -> bool:
        return one in seen and other in seen and seen[one].shape == seen[other].shape and torch.equal(seen[one], seen[other])

    pre_norm = "ln1.hook_in" not in seen or same("hook_resid_pre", "ln1.hook_in")
    has_ln1 = "ln1.hook_in" in seen and pre_norm
    mlp_norm = next((n for n in ("ln2", "ln1") if pre_norm and same(f"{n}.hook_out", "mlp.hook_in")), None)
    gains, biases, centring = _probe_norms(blocks, "ln1" if has_ln1 else None, bridge.cfg.d_model)
    mlp_gains, mlp_biases, _ = _probe_norms(blocks, mlp_norm, bridge.cfg.d_model)
    return Layout(
        centres=bool(centring) and all(centring),
        gains=gains,
        biases=biases,
        mlp_gains=mlp_gains,
        mlp_biases=mlp_biases,
        has_ln1=has_ln1,
        mlp_norm=mlp_norm,
        pre_norm=pre_norm,
        parallel="blocks.0.hook_resid_mid" not in bridge.hook_dict,
        # A mixture of experts answers to mlp.hook_pre too, but with its input.
        has_neurons=all({"in", "out"} <= set(block.mlp.submodules) for block in blocks),
        epsilon=float(bridge.cfg.eps),
        multiplier=float(getattr(model.mapped.model.config.get_text_config(), "residual_multiplier", 1.0)),
    )


def _first_block(model: "Blockwise") -> dict[str, Any]:
    """What the first block's norms and MLP read and write on two tokens, by hook."""
    import torch

    seen: dict[str, torch.Tensor] = {}
    there = model.bridge.hook_dict
    names = [n for n in ("ln1.hook_in", "ln1.hook_out", "ln2.hook_out", "mlp.hook_in") if f"blocks.0.{n}" in there]
    names += ["hook_resid_pre"]
    hooks = [(f"blocks.0.{name}", lambda x, hook, name=name: seen.update({name: x})) for name in names]
    with torch.no_grad():
        model.step(model.enter([[1, 0]]), 0, hooks)
    return seen


def run_mlp(block: Any, layout: Layout, x: Any) -> Any:
    """What a block's MLP adds to the stream when its norm gives it x, through the norm behind it where there is one."""
    if block.mlp.name is None:  # OPT keeps the two layers on the block itself
        output = block.mlp.out(block.original_component.activation_fn(getattr(block.mlp, "in")(x)))
    elif "residual" in inspect.signature(block.mlp.original_component.forward).parameters:
        output = block.mlp(x, x.new_zeros(()).expand_as(x))  # BLOOM and MPT add the stream inside the MLP
    else:
        output = block.mlp(x)
    output = output[0] if isinstance(output, tuple) else output
    output = block.ln2_post(output) if "ln2_post" in block.submodules else output
    return layout.multiplier * output


def _probe_norms(blocks: list[Any], name: str | None, d_model: int) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """Gain and bias of the norm called so in each block, ones and zeros for None, and which of them centre."""
    import torch

    gains, biases, centring = np.ones((len(blocks), d_model)), np.zeros((len(blocks), d_model)), []
    if name is not None:
        with torch.no_grad():
            for layer, block in enumerate(blocks):
                gains[layer], biases[layer], centres = probe_norm(getattr(block, name).original_component, d_model)
                centring.append(centres)
    return gains, biases, centring


def probe_norm(norm: Any, d_model: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gain, bias and whether it centres, for any norm, however its parameters are written (Gemma stores gain - 1)."""
    import torch

    parameter = next(norm.parameters(), torch.zeros(1))
    probe = torch.ones(d_model, device=parameter.device)
    probe[1::2] = -1
    if d_model % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])  # the mean must be exactly 0, and no coordinate
    bias = norm(torch.zeros_like(probe)[None, None])[0, 0]
    output = norm(PROBE_SIZE * probe[None, None])[0, 0]
    shifted = norm(PROBE_SIZE * (probe[None, None] + 0.5))[0, 0]
    scale = float(torch.linalg.vector_norm(output - bias)) or 1.0
    centres = float(torch.linalg.vector_norm(shifted - output)) < 1e-3 * scale
    gain = (output - bias) / (probe / probe.square().mean().sqrt())
    return gain.double().cpu().numpy(), bias.double().cpu().numpy(), centres
