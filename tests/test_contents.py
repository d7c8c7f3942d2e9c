"""What is really in a folder: accidents on the way to it, each with the sentence that its user
needs, and odd folders that are sound.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import streamgauge
from streamgauge.checkpoints.contents import why_unfit
from streamgauge.compare import beyond, compare_config
from streamgauge.groups.tensors import repeated_blocks
from tests import models
from tests.conftest import Audit

Auditing = Callable[..., Audit]
Tensors = dict[str, np.ndarray]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a head of its own, to be copied and broken."""
    return models.save(models.random_model("llama"), tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """The folder's tensors, changed."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def renamed(folder: Path, name: Callable[[str], str]) -> None:
    rewrite(folder, lambda tensors: {name(old): array for old, array in tensors.items()})


def configured(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def below(prefix: str) -> Callable[[Path], None]:
    return lambda folder: renamed(folder, lambda name: prefix + name)


def compiled_layers(folder: Path) -> None:
    renamed(folder, lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."))


def emptied(folder: Path) -> None:
    def empty(tensors: Tensors) -> Tensors:
        return {n: a[:0] if n.endswith("proj.weight") else a for n, a in tensors.items()}

    rewrite(folder, empty)


def transposed(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {DOWN: np.ascontiguousarray(tensors[DOWN].T)})


def other_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {DOWN: tensors[DOWN][:, :40].copy()})


def packed(folder: Path) -> None:
    def pack(tensors: Tensors) -> Tensors:
        kept = {n: a for n, a in tensors.items() if not n.endswith("down_proj.weight")}
        name = DOWN.removesuffix(".weight")
        return kept | {
            f"{name}.qweight": np.zeros((6, 32), np.int32),
            f"{name}.scales": np.zeros((1, 32), np.float16),
            f"{name}.qzeros": np.zeros((1, 4), np.int32),
        }

    rewrite(folder, pack)


def with_lora(folder: Path) -> None:
    def wrapped(tensors: Tensors) -> Tensors:
        base = {f"base_model.model.{n}": a for n, a in tensors.items()}
        lora = f"base_model.model.{DOWN.removesuffix('.weight')}.lora_A.default.weight"
        return base | {lora: np.zeros((4, 48), np.float32)}

    rewrite(folder, wrapped)


def adapter(folder: Path) -> None:
    said = {"peft_type": "LORA", "base_model_name_or_path": "someone/their-model"}
    (folder / "adapter_config.json").write_text(json.dumps(said))


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")


def adapter_without_config(folder: Path) -> None:
    adapter_alone(folder)
    (folder / "config.json").unlink()


def trainer_s_files_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
        torch.save({}, folder / name)


def sharded(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """In two files, one tensor in both."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(files, (names[:9], names[8:]), strict=True):
        held = {n: change(tensors[n]) if n == part[-1] else tensors[n] for n in part}
        save_file(held, folder / file, metadata={"format": "pt"})
    weight_map = {n: files[n not in names[:9]] for n in names}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def in_two_shards(folder: Path) -> None:
    sharded(folder, lambda array: array + 1)


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 12345\n"


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(LFS)


def pointer_of_a_configuration(folder: Path) -> None:
    (folder / "config.json").write_text(LFS)


def flattened(folder: Path) -> None:
    flat = {f"model.layers.{n}._fsdp_wrapped_module._flat_param": np.ones(9) for n in range(3)}
    rewrite(folder, lambda tensors: flat)


def without_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})


def head_in_the_index_alone(folder: Path) -> None:
    sharded(folder, lambda array: array)
    first, second = sorted(folder.glob("*.safetensors"))
    for path in (first, second):
        held = {n: t for n, t in load_file(path).items() if n != "lm_head.weight"}
        save_file(held, path, metadata={"format": "pt"})


def resized(folder: Path) -> None:
    tables = ("lm_head.weight", "model.embed_tokens.weight")
    rewrite(folder, lambda tensors: {n: t[:-3] if n in tables else t for n, t in tensors.items()})


def said_to_be_quantised(folder: Path) -> None:
    configured(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def by_mlx(folder: Path) -> None:
    said = {"group_size": 64, "bits": 4}
    configured(folder, quantization=said, quantization_config=said)


REFUSED: dict[Callable[[Path], None], str] = {
    below("_orig_mod."): "have `_orig_mod.` in them, _orig_mod.lm_head.weight first, as "
    "torch.compile leaves them: save the model that was compiled",
    below("module."): "have `module.` in them, module.lm_head.weight first, as DataParallel, DDP",
    below("language_model."): "have `language_model.` in them, language_model.lm_head.weight "
    "first, as a model with vision or audio beside the language model leaves them",
    below("base_model.model."): "have `base_model.` in them, base_model.model.lm_head.weight "
    "first, as PEFT leaves them: save what merge_and_unload() returns",
    compiled_layers: "have `_orig_mod.` in them, model.layers.0._orig_mod.self_attn.k_proj.weight",
    emptied: "tensors are empty, model.layers.0.mlp.down_proj.weight first, as DeepSpeed's ZeRO-3",
    transposed: "1 matrices are transposed, model.layers.1.mlp.down_proj.weight first "
    "([48, 32] in the file, [32, 48] in the model)",
    other_shape: "1 tensors have another shape than config.json gives them, "
    "model.layers.1.mlp.down_proj.weight first ([32, 40] in the file, [32, 48] in the model)",
    packed: "hold packed weights, model.layers.1.mlp.down_proj.qweight first, and config.json has "
    "no quantization_config",
    with_lora: "it holds matrices of a LoRA adapter, base_model.model.model.layers.1.mlp.down_proj"
    ".lora_A.default.weight first",
    adapter_alone: "holds an adapter of someone/their-model, not a model: merge it",
    adapter_without_config: "holds an adapter of someone/their-model, not a model: merge it",
    adapter: "holds adapter_config.json beside a whole model: where PEFT is installed",
    trainer_s_files_alone: "has no weights: neither model.safetensors nor",
    in_two_shards: "lies in model-00001-of-00002.safetensors and model-00002-of-00002.safetensors "
    "with different numbers",
    pointer: "model.safetensors is a pointer of Git LFS, not the file itself; run `git lfs pull`",
    pointer_of_a_configuration: "config.json is a pointer of Git LFS, not the file itself",
    flattened: "3 tensors are parameters that FSDP flattened into one each, model.layers.0._fsdp_",
    without_head: "lm_head.weight first: config.json does not tie it to the embedding; where it is "
    "that, as writers leave it that keep shared tensors once, set tie_word_embeddings to true",
    head_in_the_index_alone: "lm_head.weight first: its index names lm_head.weight in "
    "model-00001-of-00002.safetensors, which does not hold it",
    resized: "lm_head.weight has 94 rows and config.json's vocab_size is 97: the tables were "
    "resized",
    said_to_be_quantised: "has a quantization_config that says bitsandbytes, and no tensor is "
    "stored so: take it out of config.json",
    by_mlx: "holds weights quantised as MLX stores them, which streamgauge cannot open",
}


@pytest.mark.parametrize("accident", REFUSED, ids=lambda accident: accident.__name__)
def test_an_accident_is_called_by_its_name(
    accident: Callable[[Path], None], folder: Path, audit: Auditing
) -> None:
    accident(folder)
    found = audit("--model", folder, "-k", "integrity or additivity")
    assert found.exit == 1 and "Traceback" not in found.output
    reasons = {row["reason"] for row in found.rows}
    assert len(reasons) == 1 and REFUSED[accident] in reasons.pop(), found.rows[0]["reason"]


# ---- What is audited, and found


def test_an_untied_head_is_found(tmp_path: Path, audit: Auditing) -> None:
    model = models.tf.LlamaForCausalLM(models.tf.LlamaConfig(**models.GROUPED))
    folder = models.save(model, tmp_path / "model")
    configured(folder, tie_word_embeddings=True)
    row = audit("--model", folder, "-k", "integrity").rows[0]
    assert row["outcome"] == "fail"
    assert "lm_head.weight differs from model.embed_tokens.weight, which" in row["reason"]


def test_a_head_that_no_configuration_ties_is_sound(tmp_path: Path, audit: Auditing) -> None:
    """BigBird-Pegasus says that it ties its embeddings, and never does."""
    small = {"encoder_layers": 0, "decoder_layers": 3, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    config = models.tf.BigBirdPegasusConfig(**models.IDS, **small, **sizes)
    assert config.tie_word_embeddings
    folder = models.save(models.tf.BigBirdPegasusForCausalLM(config), tmp_path / "model")
    assert audit("--model", folder, "-k", "integrity").rows[0]["outcome"] == "pass"


def test_a_dead_expert_is_found_however_experts_are_stored(tmp_path: Path, audit: Auditing) -> None:
    """One by one, or all of a layer as one tensor."""
    config = models.tf.GptOssConfig(
        **models.GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    stacked = models.tf.GptOssForCausalLM(config)
    apart = models.random_model("mixtral")
    for number, model in enumerate((stacked, apart)):
        folder = models.save(model, tmp_path / f"sound-{number}")
        assert audit("--model", folder, "-k", "integrity").rows[0]["outcome"] == "pass"
        with torch.no_grad():
            model.model.layers[1].mlp.experts.down_proj[2].zero_()
        folder = models.save(model, tmp_path / f"dead-{number}")
        row = audit("--model", folder, "-k", "integrity").rows[0]
        assert row["outcome"] == "fail" and "is all zero" in row["reason"], row
        assert "expert 2" in row["reason"] or "experts.2." in row["reason"]


def test_a_tied_head_that_is_written_out_is_sound(tmp_path: Path, audit: Auditing) -> None:
    config = models.tf.LlamaConfig(**models.GROUPED, tie_word_embeddings=True)
    folder = models.save(models.tf.LlamaForCausalLM(config), tmp_path / "model")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert audit("--model", folder, "-k", "integrity").rows[0]["outcome"] == "pass"


@pytest.mark.parametrize(
    ("dtype", "moved", "outcome"),
    [
        (torch.float32, 0.0, "pass"),
        (torch.float32, 1.0, "fail"),
        (torch.bfloat16, 1.0, "pass"),  # of another dtype: nothing can be told
    ],
)
def test_old_pickled_weights_beside_new_ones_are_found(
    dtype: torch.dtype, moved: float, outcome: str, folder: Path, audit: Auditing
) -> None:
    tensors = {
        name: torch.from_numpy(array).to(dtype)
        for name, array in load_file(folder / "model.safetensors").items()
    }
    tensors[DOWN] = tensors[DOWN] + moved
    torch.save(tensors, folder / "pytorch_model.bin")
    row = audit("--model", folder, "-k", "integrity").rows[0]
    assert row["outcome"] == outcome
    if outcome == "fail":
        assert (
            f"pytorch_model.bin holds other numbers than the safetensors for 1 tensors, {DOWN}"
            in (row["reason"])
        )


def test_a_damaged_archive_beside_says_nothing(folder: Path, audit: Auditing) -> None:
    end = b"PK\x05\x06" + b"\x00" * 4 + b"\x05\x00\x05\x00" + b"\xff\x00\x00\x00" * 2 + b"\x00\x00"
    (folder / "pytorch_model.bin").write_bytes(b"\x00" * 400 + end)
    found = audit("--model", folder, "-k", "integrity")
    assert found.exit == 0 and "Traceback" not in found.output


def test_an_index_of_one_file_is_sound(folder: Path, audit: Auditing) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert audit("--model", folder, "-k", "integrity").exit == 0


def test_a_tensor_twice_with_the_same_numbers_is_sound(folder: Path, audit: Auditing) -> None:
    sharded(folder, lambda array: array)
    assert audit("--model", folder, "-k", "integrity").exit == 0


def upscaled(folder: Path, source: list[int]) -> None:
    """Layers made of these layers of the original, in order."""

    def copy(tensors: Tensors) -> Tensors:
        made = {n: a for n, a in tensors.items() if ".layers." not in n}
        for layer, old in enumerate(source):
            inside = f"model.layers.{old}."
            made |= {
                n.replace(inside, f"model.layers.{layer}."): a.copy()
                for n, a in tensors.items()
                if n.startswith(inside)
            }
        return made

    rewrite(folder, copy)
    configured(folder, num_hidden_layers=len(source))


def test_blocks_repeated_in_order_are_a_finding_and_no_fault(folder: Path, audit: Auditing) -> None:
    upscaled(folder, [0, 1, 2, 1, 2])
    found = audit("--model", folder, "-k", "integrity or repeated_blocks")
    assert found.row("weights/integrity")["outcome"] == "pass"
    row = found.row("weights/repeated_blocks")
    assert row["outcome"] == "fail" and "layers 3 to 4 are layers 1 to 2" in row["reason"]


def test_one_block_that_repeats_its_neighbour_is_a_fault(folder: Path, audit: Auditing) -> None:
    upscaled(folder, [0, 1, 1, 2])
    found = audit("--model", folder, "-k", "integrity or repeated_blocks")
    assert found.row("weights/integrity")["outcome"] == "fail"
    assert found.row("weights/repeated_blocks")["outcome"] == "pass"


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ([0, 1, 2, 3], []),
        ([0, 1, 0, 1], [(2, 3, 2)]),
        ([0, 1, 2, 3, 1, 2, 3, 4], [(4, 6, 3)]),
        ([0, 1, 0, 1, 0, 1], [(2, 3, 2), (4, 5, 4)]),
        ([0, 0, 0, 0], []),
        ([0, 1, 2, 0], []),
    ],
)
def test_runs_of_blocks(source: list[int], runs: list[tuple[int, int, int]]) -> None:
    names = [[f"h.{layer}.a", f"h.{layer}.b"] for layer in range(len(source))]
    twins = {}
    for layer, old in enumerate(source):
        first = source.index(old)
        if first < layer:
            twins |= {f"h.{layer}.{part}": f"h.{first}.{part}" for part in "ab"}
    assert repeated_blocks(names, twins) == runs


def test_layers_that_predict_further_tokens_lie_beyond_the_depth(
    folder: Path, audit: Auditing
) -> None:
    def grow(tensors: Tensors) -> Tensors:
        inside = {n: a for n, a in tensors.items() if ".layers.2." in n}
        return tensors | {n.replace(".layers.2.", ".layers.3."): a + 1 for n, a in inside.items()}

    rewrite(folder, grow)
    found = audit("--model", folder, "-k", "integrity")
    assert "tensors of layers that its config.json does not have" in found.rows[0]["reason"]
    configured(folder, num_nextn_predict_layers=1)
    assert audit("--model", folder, "-k", "integrity").exit == 0


def test_nothing_is_made_up_where_names_and_shapes_say_nothing() -> None:
    asked = {"a.weight": (2, 3), "b.weight": (3, 3)}
    assert why_unfit({"a.weight": (2, 3)}, asked, False) is None
    assert why_unfit({"x.a.weight": (2, 3), "y.b.weight": (3, 3)}, asked, False) is None
    assert why_unfit({"a.qweight": (2, 3)}, asked, True) is None


def test_shards_of_an_earlier_save_are_found(folder: Path, audit: Auditing) -> None:
    stray = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(folder / "model.safetensors")
    save_file({DOWN: tensors[DOWN]}, stray)
    assert audit("--model", folder, "-k", "integrity").exit == 0  # the same numbers
    save_file({DOWN: tensors[DOWN] + 1}, stray)
    row = audit("--model", folder, "-k", "integrity").row("weights/integrity")
    assert row["outcome"] == "fail" and row["what"] == "files beside that hold other weights"
    assert row["of"] == (
        f"{stray.name}, which no index names, holds other numbers than the checkpoint for 1 "
        f"tensors, {DOWN} first"
    )
    save_file({DOWN: tensors[DOWN][:, :3].copy()}, stray)
    assert audit("--model", folder, "-k", "integrity").exit == 1  # another shape
    save_file({"unheard.of": tensors[DOWN]}, stray)
    assert audit("--model", folder, "-k", "integrity").exit == 0  # as consolidated.safetensors
    stray.write_bytes(b"damaged")
    assert audit("--model", folder, "-k", "integrity").exit == 0


def test_a_lost_rope_base_is_found_by_a_comparison(folder: Path, sound: Path) -> None:
    configured(sound, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    configured(folder, rope_parameters={"rope_type": "linear", "factor": 2.0})
    records = [streamgauge.measure(path, groups=["stream"]) for path in (sound, folder)]
    differing = {one.name: one.says for one in beyond(compare_config(*records))}
    assert differing["rope_parameters.rope_theta"].startswith("500000.0 in the baseline, now ")
    assert "rope_parameters.rope_type" in differing
