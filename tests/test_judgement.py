"""The verdict on two checkpoints: what it says of faults wherever they sit, of one function in
other weights, of quantisation, training and strangers; and that harmless changes are quiet.
"""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.compare import differences
from streamgauge.compare.findings import findings
from streamgauge.compare.judgement import (
    ACCEPTED,
    DAMAGED,
    IDENTICAL,
    OTHER_MODEL,
    OTHER_SETTINGS,
    OTHER_TOKENIZER,
    PARTLY_TRAINED,
    QUANTISED,
    SAME_FUNCTION,
    SAME_WEIGHTS,
    TRAINED,
    Verdict,
    judge,
)
from streamgauge.diff import COMPARED, read_both
from streamgauge.engine.pieces import runs
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record
from tests import faults, models
from tests.faults import Files
from tests.reparametrised import REWRITINGS

ROWS = Prompts(
    [[1, 5, 9, 2, 77, 31, 4], [3, 8, 1, 60, 22, 9, 9, 14]] * 3, "test", None, sampled=True
)
LAYERS = 5
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(**models.GPT2 | {"n_layer": LAYERS}),
    "llama": lambda: tf.LlamaConfig(
        **models.LLAMA
        | {"num_hidden_layers": LAYERS, "num_key_value_heads": 2, "head_dim": 8}
        | {"tie_word_embeddings": True}
    ),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def only_what_is_compared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("streamgauge.measure")
        wanted = ("instrument", *COMPARED)
        patch.setattr(module, "GROUPS", {name: module.GROUPS[name] for name in wanted})
        yield


def random_model(name: str, seed: int = 0) -> Any:
    """A model with gains and biases of its own."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Record]]:
    """A folder by the model's name and dtype, and its record; made once."""
    known: dict[tuple[str, str], tuple[Path, Record]] = {}

    def get(name: str, dtype: str = "fp32") -> tuple[Path, Record]:
        if (name, dtype) not in known:
            folder = tmp_path_factory.mktemp("baseline") / f"{name}-{dtype}"
            models.save(random_model(name).to(DTYPES[dtype]), folder)
            known[name, dtype] = folder, measured(folder)
        return known[name, dtype]

    return get


def measured(folder: Path) -> Record:
    return streamgauge.measure(folder, rows=ROWS)


def verdict_on(old: tuple[Path, Record], folder: Path) -> Verdict:
    """The verdict by every number of both."""
    new = measured(folder)
    changes = read_both(open_checkpoint(old[0]), open_checkpoint(folder), old[1])
    return judge(old[1], new, differences(old[1], new), changes)


def by_sketches(old: tuple[Path, Record], folder: Path) -> Verdict:
    """The verdict by records alone."""
    new = measured(folder)
    return judge(old[1], new, differences(old[1], new))


# ---- Faults


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_faults_of_the_first_and_the_last_layer_are_named(
    name: str, layer: int, baselines: Any, tmp_path: Path
) -> None:
    """By their tensors alone, where these can be read side by side."""
    folder, record = baselines(name)
    wrong, tried = [], 0
    for number, fault in enumerate(faults.FAULTS):
        files = Files(folder, layer)
        if not fault.layers or (layer and max(fault.layers) > faults.LAYER):
            continue  # of no layer, or of the one behind it too
        if fault.change(files) is False or fault.named() in ("lacks", "missing"):
            continue
        target = files.write(tmp_path / str(number))
        found = findings(read_both(open_checkpoint(folder), open_checkpoint(target), record))
        words, layers = fault.named(layer), set(found[0].layers)
        tried += 1
        if len(found) != 1 or layers - {layer, layer + 1} or words not in found[0].says:
            wrong.append((fault.name, [one.says for one in found]))
    assert tried >= 12
    assert not wrong


def spoil(folder: Path, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of the file itself."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, at: c.__setitem__(slice(at, at + 4096), bytes(4096)), "bytes) are zero"),
        (lambda c, at: c.__setitem__(slice(at, at + 4096), c[at - 8192 : at - 4096]), "differ"),
        (lambda c, at: c.__setitem__(at + 3, c[at + 3] ^ 0x04), "one bit turned"),
    ],
)
def test_damaged_bytes_are_found_where_they_are(
    change: Any, says: str, baselines: Any, tmp_path: Path
) -> None:
    """A page of zeros, a page of another tensor, one bit of an exponent."""
    old = baselines("llama")
    folder = Path(shutil.copytree(old[0], tmp_path / "new"))
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    said = json.loads((folder / "model.safetensors").read_bytes()[8 : 8 + header])
    name = "model.layers.3.mlp.down_proj.weight"
    start = 8 + header + said[name]["data_offsets"][0] + 512
    spoil(folder, lambda content: change(content, start))
    verdict = verdict_on(old, folder)
    assert verdict.kind == DAMAGED and not verdict.passes("function")
    assert f"layer 3 mlp {name}" in verdict.says and says in verdict.says
    assert verdict.first is not None and verdict.first.startswith("layer 3 mlp")
    alone = measured(folder).integrity["runs"]
    assert len(alone) == ("are zero" in says)  # the others look like weights
    assert not old[1].integrity["runs"]


def test_ranges_of_one_value_are_told_from_a_model_s_own_zeros() -> None:
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)).half()

    def with_value(place: slice, value: float, flat: bool = True) -> torch.Tensor:
        changed = weight.clone()
        (changed.view(-1) if flat else changed)[place] = value
        return changed

    assert runs(weight) == []
    assert runs(with_value(slice(1000, 3048), 0)) == [(1000, 2048)]
    assert runs(with_value(slice(40_000, 40_700), 1.5)) == [(40_000, 700)]
    assert runs(with_value(slice(-600, None), 0)) == [(64_936, 600)]
    assert runs(with_value(slice(5, 9), 0, flat=False)) == []  # pruned neurons
    assert runs(with_value(slice(0, None), 0)) == []  # dead, which is said elsewhere
    padded = weight.clone()
    padded[:, 200:] = 0
    assert runs(padded) == []


def test_a_layer_that_was_scaled_is_one_finding(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    files = Files(old[0], 3)
    for name in files.of_layer(3):
        files.tensors[name] = files.tensors[name] * 1.3
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.says == "damaged: layer 3, all 9 tensors: ×1.3"
    assert len(verdict.found) == 1


# ---- One function in other weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_other_weights_of_the_same_function(
    name: str, dtype: str, baselines: Any, tmp_path: Path
) -> None:
    old, wrong, tried = baselines(name, dtype), [], 0
    for number, rewriting in enumerate(REWRITINGS):
        files = Files(old[0], 1)
        if rewriting.change(files) is False:
            continue
        files.tensors = {n: t.to(DTYPES[dtype]) for n, t in files.tensors.items()}
        verdict = verdict_on(old, files.write(tmp_path / str(number)))
        tried += 1
        named = rewriting.words in verdict.says
        if not verdict.passes("function") or not named:
            wrong.append((rewriting.name, verdict.says))
    assert tried >= 9
    assert not wrong


def test_other_weights_of_the_same_function_by_records_alone(
    baselines: Any, tmp_path: Path
) -> None:
    old = baselines("llama")
    for number, rewriting in enumerate(REWRITINGS[:9]):
        files = Files(old[0], 1)
        rewriting.change(files)
        verdict = by_sketches(old, files.write(tmp_path / str(number)))
        assert verdict.kind == SAME_FUNCTION, (rewriting.name, verdict.says)


def test_a_fault_beside_folded_gains_is_no_same_function(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    files = Files(old[0])
    REWRITINGS[0].change(files)
    files.layer = 3
    files["W_O"] = files["W_O"] * 1.05
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.kind == DAMAGED and verdict.agrees["activations"] is False


def test_rows_that_take_their_share_are_not_idle(baselines: Any, tmp_path: Path) -> None:
    old = baselines("gpt2")
    files = Files(old[0])
    table = files["embed"]
    files["embed"] = torch.cat([table, torch.zeros(64, table.shape[1])])  # of 97 tokens
    files.config["vocab_size"] += 64
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.kind == DAMAGED and "vocab_size 97 in the baseline, now 161" in verdict.says


def test_rows_that_no_prompt_holds_are_no_other_writing(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    for number, spoil_rows in enumerate((lambda t: 3 * t + 0.2, lambda t: t[:0])):
        files = Files(old[0])
        table = files["embed"]
        files["embed"] = torch.cat([table[:80], spoil_rows(table[80:])])  # of tokens in no prompt
        files.config["vocab_size"] = len(files["embed"])
        verdict = verdict_on(old, files.write(tmp_path / str(number)))
        assert verdict.kind == DAMAGED and not verdict.passes("function"), verdict.says


def test_a_row_that_only_its_own_token_reads_is_no_other_writing(
    baselines: Any, tmp_path: Path
) -> None:
    """Activations and losses of the prompts agree to the last bit."""
    untied = Files(baselines("llama")[0])
    untied.config["tie_word_embeddings"] = False
    untied.tensors["lm_head.weight"] = untied["embed"].clone()
    folder = untied.write(tmp_path / "old")
    old = folder, measured(folder)
    files = Files(folder)
    files["embed"][90] *= 3
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.agrees == {"activations": True, "predictions": True}
    assert verdict.kind == DAMAGED and "1 of 97 rows differ (90): ×3" in verdict.says


# ---- Nothing, and everything


@pytest.mark.parametrize("name", CONFIGS)
def test_harmless_changes_are_the_same_weights(name: str, baselines: Any, tmp_path: Path) -> None:
    old = baselines(name)
    assert verdict_on(old, old[0]).kind == IDENTICAL
    for number, (what, change) in enumerate(faults.HARMLESS.items()):
        files = Files(old[0])
        if change(files) is not False:
            for judged in (verdict_on, by_sketches):
                verdict = judged(old, files.write(tmp_path / f"{number} {judged.__name__}"))
                assert verdict.kind in (IDENTICAL, SAME_WEIGHTS), (what, verdict.says)
                assert verdict.passes() and not verdict.found


def test_training_is_told_from_a_stranger(baselines: Any, tmp_path: Path) -> None:
    old = baselines("gpt2")
    further, stranger = random_model("gpt2"), random_model("gpt2", seed=1)
    with torch.no_grad():
        for parameter in further.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    verdict = verdict_on(old, models.save(further, tmp_path / "further"))
    assert verdict.kind == TRAINED and verdict.says.startswith("the same model trained further")
    assert verdict.passes("trained") and not verdict.passes("function") and not verdict.passes()
    other = verdict_on(old, models.save(stranger, tmp_path / "stranger"))
    assert other.kind == OTHER_MODEL and "nothing in common" in other.says
    assert by_sketches(old, tmp_path / "further").kind == TRAINED
    assert by_sketches(old, tmp_path / "stranger").kind == OTHER_MODEL
    assert not any(other.passes(same) for same in ACCEPTED)


@pytest.mark.parametrize("size", [0.001, 0.003, 0.01])
def test_a_small_step_of_training_in_bf16_has_no_other_name(
    size: float, baselines: Any, tmp_path: Path
) -> None:
    old = baselines("llama", "bf16")
    files = Files(old[0])
    for name, tensor in files.tensors.items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        files.tensors[name] = (tensor.float() + size * tensor.float().std() * noise).bfloat16()
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert "scaled" not in verdict.says and "factor" not in verdict.says
    assert verdict.kind in (TRAINED, SAME_FUNCTION) and verdict.passes("trained")
    if size == 0.01:
        assert verdict.kind == TRAINED


@pytest.mark.parametrize("parts", [("W_Q",), ("W_Q", "W_V"), ("W_in", "W_gate", "W_out")])
def test_an_adapter_that_was_merged_is_training(
    parts: tuple[str, ...], baselines: Any, tmp_path: Path
) -> None:
    old = baselines("llama")
    files = Files(old[0])
    torch.manual_seed(4)
    for layer in range(LAYERS):
        files.layer = layer
        for part in parts:
            weight = files[part]
            update = torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
            files[part] = weight + 0.05 * update * weight.norm() / update.norm()
    verdict = verdict_on(old, files.write(tmp_path / "merged"))
    assert verdict.kind == TRAINED and verdict.passes("trained"), verdict.says
    files.layer = 2
    files["W_O"] = files["W_O"].roll(8, 1)
    assert not verdict_on(old, files.write(tmp_path / "damaged")).passes("trained")


def nudged(files: Files, names: list[str], size: float = 0.01) -> None:
    """Tensors that moved by so much, as training moves them."""
    torch.manual_seed(3)
    for name in names:
        tensor = files.tensors[name].float()
        moved = tensor + size * tensor.std() * torch.randn(tensor.shape)
        files.tensors[name] = moved.to(files.tensors[name].dtype)


def test_an_adapter_of_some_layers_is_training_by_its_rank(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    files = Files(old[0])
    torch.manual_seed(4)
    for files.layer in (3, 4):
        weight = files["W_in"]
        update = torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
        files["W_in"] = weight + 0.05 * update * weight.norm() / update.norm()
    verdict = verdict_on(old, files.write(tmp_path / "merged"))
    assert verdict.kind == TRAINED and "as adapters are merged" in verdict.says, verdict.says


def test_layers_that_moved_beside_others_that_did_not(baselines: Any, tmp_path: Path) -> None:
    """Frozen, or of two states of training: no one can tell, and the sentence says so."""
    old = baselines("gpt2")
    files = Files(old[0])
    nudged(files, [*files.of_layer(3), *files.of_layer(4)])
    verdict = verdict_on(old, files.write(tmp_path / "frozen"))
    assert verdict.kind == PARTLY_TRAINED and "layers 3 to 4: moved by" in verdict.says
    assert not verdict.passes("trained")
    files = Files(old[0])
    nudged(files, [name for name in files.tensors if name.endswith("bias")], 0.1)
    verdict = verdict_on(old, files.write(tmp_path / "biases"))
    assert verdict.kind == PARTLY_TRAINED, verdict.says
    files = Files(old[0])
    nudged(files, files.of_layer(3), 0.05)
    one = verdict_on(old, files.write(tmp_path / "one"))
    assert one.kind == DAMAGED, one.says


def test_tokens_more_are_no_damage(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    for name, size in (("new", 0.0), ("trained", 0.01)):
        files = Files(old[0])
        nudged(files, list(files.tensors), size)
        table = files["embed"]
        files["embed"] = torch.cat([table, 0.1 * torch.randn(3, table.shape[1])])
        files.config["vocab_size"] += 3
        folder = files.write(tmp_path / name)
        new = measured(folder)
        changes = read_both(open_checkpoint(old[0]), open_checkpoint(folder), old[1])
        tokens = ["3 tokens more"]
        verdict = judge(old[1], new, differences(old[1], new), changes, tokens)
        assert verdict.kind == (TRAINED if size else OTHER_TOKENIZER), verdict.says
        assert "3 tokens more" in verdict.says and not verdict.passes("trained")


@pytest.mark.parametrize("size", [0.001, 0.01])
def test_a_scaled_matrix_beside_training_is_damage(
    size: float, baselines: Any, tmp_path: Path
) -> None:
    old = baselines("llama")
    files = Files(old[0], 3)
    nudged(files, list(files.tensors), size)
    assert verdict_on(old, files.write(tmp_path / "trained")).passes("trained")
    for part, times, says in (("W_in", 1.2, "layer 3 mlp"), ("ln2", 2.0, "layer 3 norm")):
        spoilt = Files(tmp_path / "trained", 3)
        spoilt[part] = spoilt[part] * times
        folder = spoilt.write(tmp_path / part)
        for judged in (verdict_on, by_sketches):
            verdict = judged(old, folder)
            assert verdict.kind == DAMAGED and says in verdict.says, verdict.says
    assert f"×{times:.2g}" in verdict_on(old, folder).says
    spoilt = Files(tmp_path / "trained", 3)
    spoilt["ln2"] = spoilt["ln2"] + 1
    verdict = verdict_on(old, spoilt.write(tmp_path / "offset"))
    assert verdict.kind == DAMAGED and "every number larger by 1" in verdict.says


def _one_number(f: Files) -> None:
    f["W_out"][3, 4] = 3e38


def _enormous_gain(f: Files) -> None:
    f["ln1"] = f["ln1"] + 50 * torch.randn(f["ln1"].shape)


def _dead_rows(f: Files) -> None:
    f["W_out"][4:7] = 0


def _rows_scaled(f: Files) -> None:
    f["W_V"] = f["W_V"] * torch.linspace(0.5, 2, len(f["W_V"]))[:, None]


def _transposed(f: Files) -> None:
    f["W_O"] = Files(f.folder, f.layer)["W_O"].T


@pytest.mark.parametrize(
    "spoil_it", [_one_number, _enormous_gain, _dead_rows, _rows_scaled, _transposed]
)
def test_what_has_a_name_is_no_training(spoil_it: Any, baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    files = Files(old[0], 3)
    nudged(files, list(files.tensors), 0.01)
    spoil_it(files)
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.kind == DAMAGED and "layer 3" in verdict.says, verdict.says


def test_one_matrix_of_another_is_neither_an_adapter_nor_another_model(
    baselines: Any, tmp_path: Path
) -> None:
    old = baselines("llama")
    for number, size in enumerate((2.0, 20.0)):
        files = Files(old[0], 3)
        weight = files["W_in"]
        update = torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
        files["W_in"] = weight + size * update * weight.norm() / update.norm()
        verdict = verdict_on(old, files.write(tmp_path / str(number)))
        assert verdict.kind == DAMAGED and "layer 3 mlp" in verdict.says, verdict.says


def test_a_few_numbers_of_a_gain_are_no_damage_in_bf16(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama", "bf16")
    files = Files(old[0])
    nudged(files, [n for n in files.of_layer(3) + files.of_layer(4) if "norm" not in n], 0.1)
    files.layer = 3
    gain = files["ln2"].clone()
    gain[[1, 7, 20]] *= 1.0078125
    files["ln2"] = gain
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.kind == PARTLY_TRAINED, verdict.says


def test_pruned_weights_are_neither_trained_nor_quantised(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    pruned = rounded(old[0], tmp_path / "new", lambda x: x * (torch.rand(x.shape) < 0.5))
    verdict = verdict_on(old, pruned)
    assert not verdict.passes("trained") and not verdict.passes("quantised"), verdict.says
    assert "of its numbers are zero now" in verdict.says


def _zeroed_norm(f: Files) -> None:
    f["final"] = torch.zeros_like(f["final"])


def _turned_gain(f: Files) -> None:
    f["ln2"] = -f["ln2"]


def _stranger_s_matrix(f: Files) -> None:
    f["W_O"] = torch.randn(f["W_O"].shape) * f["W_O"].std()


def _other_activation(f: Files) -> None:
    f.config["hidden_act"] = "gelu"


@pytest.mark.parametrize(
    "damage", [_zeroed_norm, _turned_gain, _stranger_s_matrix, _other_activation]
)
def test_damage_beside_training_is_no_training(damage: Any, baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    files = Files(old[0])
    torch.manual_seed(3)
    for name, tensor in files.tensors.items():
        files.tensors[name] = tensor + 0.01 * tensor.std() * torch.randn(tensor.shape)
    assert verdict_on(old, files.write(tmp_path / "trained")).passes("trained")
    damage(files)
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert not verdict.passes("trained"), verdict.says
    assert "beyond further training" in verdict.says or "besides, hidden_act" in verdict.says


def test_one_step_of_adam_is_no_quantisation(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    stepped = rounded(old[0], tmp_path / "new", lambda x: x + 1e-4 * torch.randn(x.shape).sign())
    assert verdict_on(old, stepped).kind == TRAINED


def test_a_dead_head_is_no_rounding(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    target = rounded(old[0], tmp_path / "int8", to_int8)
    files = Files(target, 3)
    files["W_out"][4:7] = 0
    verdict = verdict_on(old, files.write(tmp_path / "new"))
    assert verdict.kind == DAMAGED and "3 of 32 rows differ (4, 5, 6): all zero" in verdict.says


def test_norms_are_seen_where_sketches_see_nothing(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    files = Files(old[0], 3)
    files["W_Q"] = files["W_Q"] * 1.02
    files.tensors = {name: tensor.bfloat16() for name, tensor in files.tensors.items()}
    verdict = by_sketches(old, files.write(tmp_path / "new"))
    assert not verdict.passes() and "(+2.0" in verdict.says, verdict.says


def rounded(folder: Path, target: Path, step: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy whose layers' matrices are rounded."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and ".layers." in name:
            tensors[name] = step(tensor).contiguous()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def to_int8(tensor: torch.Tensor) -> torch.Tensor:
    scale = tensor.abs().amax(1, keepdim=True) / 127
    return (tensor / scale).round() * scale


def to_fp8(tensor: torch.Tensor) -> torch.Tensor:
    scale = 448 / tensor.abs().max()
    return (tensor * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize("step", [to_int8, to_fp8])
def test_rounding_to_few_bits_is_a_quantisation(step: Any, baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    target = rounded(old[0], tmp_path / "new", step)
    verdict = verdict_on(old, target)
    assert verdict.kind == QUANTISED, verdict.says
    assert verdict.passes("quantised") and not verdict.passes()  # nothing says that it is one
    files = Files(target, 3)
    files["W_Q"] = files["W_Q"].roll(8, 0)
    beyond = verdict_on(old, files.write(tmp_path / "beyond"))
    assert beyond.kind == DAMAGED and "beyond a quantisation" in beyond.says
    assert "layer 3 attn model.layers.3.self_attn.q_proj.weight" in beyond.says


def test_noise_is_no_quantisation(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    noisy = rounded(old[0], tmp_path / "new", lambda x: x + 0.01 * x.std() * torch.randn(x.shape))
    assert verdict_on(old, noisy).kind == TRAINED


def test_an_entry_that_no_model_reads_is_none(baselines: Any, tmp_path: Path) -> None:
    old = baselines("llama")
    for number, entry in enumerate(({"unsloth_fixed": True}, {"rms_norm_eps": 1e-3})):
        files = Files(old[0])
        files.config |= entry
        verdict = verdict_on(old, files.write(tmp_path / str(number)))
        assert verdict.kind == (OTHER_SETTINGS if number else IDENTICAL)
