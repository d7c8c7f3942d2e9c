"""The laws that draw, on models with faults that only draws find: which sequence they end in, and
that the same is drawn every time.
"""

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers as tf
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import streamgauge
from fixtures.draws import draws_through_model
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import walk
from streamgauge.engine.layout import probe_layout
from streamgauge.engine.load import load_model
from streamgauge.engine.mapped import Mapped
from streamgauge.groups.draws import draws_group, examples
from streamgauge.measure import DRAWS as DRAWS_OF_AN_AUDIT
from streamgauge.measure import GROUPS, Wanted, current_groups
from streamgauge.numerics.draws import LAWS, NO_NUMBER, TWINS, Draw
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record
from streamgauge.strategies import PROFILES, all_draws, heads, smallest, token_sequences
from tests import faults, models
from tests.conftest import ROOT, Audit
from tests.records import sound_record

BUNDLED = ROOT / "fixtures" / "bundled" / "pystdlib-3m"
TEXTS = Prompts([[5, 6, 7, 8, 9, 10]], "text", None)
DRAWS, LAYER, FAR, TOKEN = 20, 1, 40, 39


def _on(module: Any, change: Callable[[torch.Tensor], Any]) -> None:
    """Let a module's first output go through a change, in place."""

    def hook(module: Any, args: Any, output: Any) -> None:
        change(output if isinstance(output, torch.Tensor) else output[0])

    module.register_forward_hook(hook)


def _later_leaks(x: torch.Tensor) -> None:
    if x.shape[1] > FAR:
        x += 1e-3 * x[:, -1:]


def _far_is_off(x: torch.Tensor) -> None:
    x[:, FAR:] *= 100


def _first_row_wins(x: torch.Tensor) -> None:
    x += 1e-3 * x[:1]


def _alone_is_off(module: Any, args: Any, output: torch.Tensor) -> None:
    if output.shape[1] == 1:
        output += 1e-8 * args[0]


def _neuron_is_off(x: torch.Tensor) -> None:
    x[..., 3] *= 1.01


def _head_is_off(module: Any, args: Any) -> Any:
    (x,) = args
    return (torch.cat([x[..., :8], 1.01 * x[..., 8:16], x[..., 16:]], -1),)


def _column_is_off(module: Any, args: Any) -> Any:
    (x,) = args
    return (torch.cat([x[..., :3], 1.01 * x[..., 3:4], x[..., 4:]], -1),)


def _cache_is_off(module: Any, args: Any, kwargs: Any) -> Any:
    caches = [one for one in (*args, *kwargs.values()) if isinstance(one, Cache)]
    if caches and caches[0].get_seq_length(LAYER):
        return (args[0] * 1.01, *args[1:]), kwargs
    return None


def _embedding_is_huge(model: Blockwise) -> None:
    table = next(t for name, t in model.mapped.stored.items() if name.endswith("wte.weight"))
    table[TOKEN] *= 1e38


PLANTED: dict[str, Callable[[Blockwise], Any]] = {
    "causality": lambda m: _on(m.blocks[LAYER].mlp, _later_leaks),
    "additivity": lambda m: _on(m.blocks[LAYER], _far_is_off),
    "contribution_bound": lambda m: _on(m.blocks[LAYER], _far_is_off),
    "scale_blindness": lambda m: m.blocks[LAYER].ln_2.register_forward_hook(_alone_is_off),
    "neurons": lambda m: _on(m.blocks[LAYER].mlp.c_fc, _neuron_is_off),
    "heads": lambda m: m.blocks[LAYER].attn.c_proj.register_forward_pre_hook(_head_is_off),
    "value_basis": lambda m: m.blocks[LAYER].attn.c_proj.register_forward_pre_hook(_column_is_off),
    "batch": lambda m: _on(m.blocks[LAYER], _first_row_wins),
    "cache": lambda m: m.blocks[LAYER].register_forward_pre_hook(_cache_is_off, with_kwargs=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.gpt2(2), tmp_path_factory.mktemp("draws"))


def drawn(
    folder: Path, plant: Callable[[Blockwise], Any] = lambda model: None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of the group on a model with a fault, and the smallest draws that find it."""
    model = Blockwise(load_model(open_checkpoint(folder), "cpu").mapped)
    layout = probe_layout(model)
    plant(model)
    group = draws_group(model, layout, TEXTS, DRAWS)
    walk(model, {"draws": group})
    arrays, _ = group.found()
    return arrays, examples(group, arrays, TEXTS)["examples"]


def test_every_block_is_read_once(folder: Path) -> None:
    """Passes of the whole model, one of them of another skeleton, take what the walk has."""
    model = Blockwise(load_model(open_checkpoint(folder), "cpu").mapped)
    group = draws_group(model, probe_layout(model), TEXTS, DRAWS)
    read, lent = [], []
    model.mapped.after_taking.append(read.append)
    in_memory = model.mapped._in_memory
    model.mapped._in_memory = lambda name: lent.append(in_memory(name)) or lent[-1]
    walk(model, {"draws": group})
    assert read == model.paths
    assert len(group.whole) == 3
    assert lent and all(matrix is not None for matrix in lent)


def test_a_sound_model_breaks_nothing(folder: Path) -> None:
    arrays, found = drawn(folder)
    assert arrays.keys() == LAWS.keys()
    assert not found
    for law, ratios in arrays.items():
        assert ratios.max() < 0.5, law
        assert (ratios[:, 0] >= 0).any()


@pytest.mark.parametrize("law", PLANTED)
def test_a_fault_is_found_and_made_small(law: str, folder: Path) -> None:
    _, found = drawn(folder, PLANTED[law])
    example = found[law]
    print(law, example)
    if law in ("causality", "additivity", "contribution_bound"):
        # The first position beyond, and for what later tokens do one that they can reach.
        assert len(example["ids"]) == FAR + 1
        assert example["layer"] == LAYER
    elif law in TWINS:
        assert example["twin"] == law
        assert example["layer"] == LAYER
    if law == "scale_blindness":
        assert example["ids"] == [0]
        assert example["layer"] == LAYER
    assert example["ratio"] > 1


def test_one_token_is_found(folder: Path) -> None:
    arrays, found = drawn(folder, _embedding_is_huge)
    assert max(ratios.max() for ratios in arrays.values()) == NO_NUMBER
    for example in found.values():
        assert set(example["ids"]) == {TOKEN}
        assert len(example["ids"]) <= 2  # what needs something behind its beginning needs two


def test_another_attention_that_is_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def off(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(module, query * (1.01 if query.shape[-2] > FAR else 1), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", off)
    _, found = drawn(folder)
    assert list(found) == ["attention_implementation"]
    assert len(found["attention_implementation"]["ids"]) == FAR + 1


def test_what_is_drawn_is_always_the_same() -> None:
    def draws() -> list[Draw]:
        return all_draws(token_sequences(97, 64, [1, 2], [[5, 6, 7]], 50), 50)

    first = draws()
    assert first == draws()
    assert len(set(first)) == len(first) > 40
    lengths = {len(draw.ids) for draw in first}
    assert min(lengths) == 1
    assert max(lengths) > 55
    assert all(0 <= i < 97 for draw in first for i in draw.ids)
    assert all(1 <= draw.kept <= len(draw.ids) for draw in first)
    assert {draw.twin for draw in first} == set(TWINS)


def test_heads_are_drawn_from_layers_that_have_them() -> None:
    found = all_draws(heads({0: 2, 5: 3}), 100)
    assert {(draw.layer, draw.head) for draw in found} == {(0, 0), (0, 1), (5, 0), (5, 1), (5, 2)}


def test_more_draws_are_measured_again_and_fewer_are_not() -> None:
    record = Record({}, {"groups": GROUPS, "draws": {"asked": 10}, "n_layers": 3})
    for asked, kept in ((10, True), (3, True), (11, False)):
        assert ("draws" in current_groups(record, Wanted(draws=asked))) == kept


def test_a_head_that_only_draws_find(
    audit: Callable[..., Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that is one percent off lies within what 256 samples can tell, not within what a basis
    can.
    """
    law = "attention/frobenius_is_random_response"
    audit("--model", BUNDLED, "-k", "frobenius")
    (path,) = (tmp_path / "store").rglob("*.safetensors")
    record = Record.load(path)
    norms = record.array("weights/W_OV_frobenius").copy()
    norms[9, 1] *= 1.01
    # As if as many sequences had been drawn as `thorough` asks for.
    record.metadata["draws"]["asked"] = PROFILES["thorough"]
    Record(record.arrays | {"weights/W_OV_frobenius": norms}, record.metadata).save(path)
    found = audit("--model", BUNDLED, "-k", "frobenius", "--hypothesis-profile", "thorough")
    row = found.row(law)
    assert row["outcome"] == "fail"
    assert row["of"] == "layer 9, head 1 on a basis, drawn"
    assert row["what"].startswith("distance")


def test_a_failing_draw_is_said_with_what_replays_it(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    law = "attention/heads_have_no_order"
    audit("--model", BUNDLED, "-k", "heads_have")
    (path,) = (tmp_path / "store").rglob("*.safetensors")
    record = Record.load(path)
    example = {"ids": list(range(12)), "kept": 3, "twin": "heads", "seed": 0, "layer": 4}
    said = record.metadata["draws"] | {"examples": {"heads": example | {"ratio": 7.5}}}
    broken = replace(record, metadata=record.metadata | {"draws": said})
    broken.arrays["draws/heads"][0, 4] = 8.5
    broken.save(path)
    found = audit("--model", BUNDLED, "-k", "heads_have")
    row = found.row(law)
    assert (row["outcome"], row["value"]) == ("fail", 8.5)
    assert "12 tokens, 0, 1, 2, 3, 4, 5, 6, 7, …, first at layer 4" in row["of"]
    again = "heads --tokens 0,1,2,3,4,5,6,7,8,9,10,11 --kept 3 --seed 0"
    assert f"replay: python -m streamgauge replay {BUNDLED} {again}" in found.output


def test_a_fault_that_needs_other_rows_is_kept(folder: Path) -> None:
    """A draw by itself does not show it; what was found counts."""

    def leaks(model: Blockwise) -> None:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            if len(output) > 2:
                output += 1e-3 * output[:1]

        model.blocks[LAYER].mlp.register_forward_hook(hook)

    arrays, found = drawn(folder, leaks)
    assert arrays["batch"].max() > 1
    assert found["batch"]["ratio"] > 1


def test_what_ends_in_an_error_is_no_pass(folder: Path) -> None:
    model = Blockwise(load_model(open_checkpoint(folder), "cpu").mapped)

    def fails(module: Any, args: Any, kwargs: Any) -> None:
        if any(isinstance(one, Cache) for one in (*args, *kwargs.values())):
            raise RuntimeError("out of memory")

    model.blocks[LAYER].register_forward_pre_hook(fails, with_kwargs=True)
    group = draws_group(model, probe_layout(model), TEXTS, 6)
    walk(model, {"draws": group})
    arrays, absent = group.found()
    assert "cache" not in arrays
    assert "cache" not in absent
    assert group.failed == {"cache": "RuntimeError: out of memory"}


UNLIKE = {  # heads that are told from each other, or lie otherwise than one would think
    "codegen": lambda: tf.CodeGenConfig(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8
    ),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, multi_query=False
    ),
    "stablelm": lambda: tf.StableLmConfig(**models.GROUPED, qk_layernorm=True),
    "diffllama": lambda: tf.DiffLlamaConfig(**models.GROUPED, head_dim=8),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "roberta": lambda: tf.RobertaConfig(
        **models.LLAMA | {"max_position_embeddings": 66}, is_decoder=True
    ),
}


@pytest.mark.parametrize("name", [*models.ARCHITECTURES, *UNLIKE])
def test_no_sound_architecture_breaks_a_law(name: str) -> None:
    torch.manual_seed(0)
    config = UNLIKE[name]() if name in UNLIKE else models.ARCHITECTURES[name].config()
    config._attn_implementation = "eager"
    plain = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model = Blockwise(Mapped.of(plain))
    group = draws_group(model, probe_layout(model), TEXTS, DRAWS)
    walk(model, {"draws": group})
    arrays, absent = group.found()
    assert not group.failed
    assert arrays.keys() | absent.keys() | {"batch"} >= LAWS.keys()
    for law, ratios in arrays.items():
        assert ratios.max() < 0.5, law


def test_profiles_say_how_many() -> None:
    found = []
    for profile in (None, "audit", "thorough"):
        config = SimpleNamespace(getoption=lambda *names, profile=profile: profile)
        found.append(draws_through_model(cast(pytest.Config, config)))
    assert found == [DRAWS_OF_AN_AUDIT, PROFILES["audit"] // 4, 300]
    assert found[0] == found[1]


def test_an_unknown_profile_is_refused(run_pytest: Callable[..., Any]) -> None:
    done = run_pytest("--model", BUNDLED, "--hypothesis-profile", "throrough", "-k", "causality")
    assert done.returncode == 4
    assert "no hypothesis profile 'throrough'; ours are audit, thorough" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tokens", "5,x"), "is no list as 17,3,3"),
        (("--tokens", "5,4000"), "ids below 2048"),
        (("--tokens", "5", "--kept", "2"), "is not between 1 and 1"),
    ],
)
def test_a_replay_that_cannot_be(
    more: tuple[str, ...], said: str, run_streamgauge: Callable[..., Any]
) -> None:
    done = run_streamgauge("replay", BUNDLED, "causality", *more)
    assert done.returncode in (1, 4)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_replay_says_what_the_record_does(run_streamgauge: Callable[..., Any]) -> None:
    done = run_streamgauge("replay", BUNDLED, "neurons", "--tokens", "17,3,3", "--kept", "2")
    assert done.returncode == 0, done.stderr
    (ratio,) = re.findall(r"neurons: (\S+) times what rounding explains", done.stdout)
    assert 0 < float(ratio) < 1


@pytest.mark.parametrize("asked", ["neurons_have_no_order", "mlp/neurons_have_no_order"])
def test_a_replay_knows_laws_by_their_files(
    asked: str, run_streamgauge: Callable[..., Any]
) -> None:
    done = run_streamgauge("replay", BUNDLED, asked, "--tokens", "17,3,3")
    assert done.returncode == 0, done.stderr
    assert "another order of the hidden neurons" in done.stdout


def test_an_interrupt_is_not_lost_in_what_hypothesis_leaves_behind() -> None:
    before = list(gc.callbacks)
    found: list[bool] = []
    # A generation of cyclic garbage is not collected meanwhile, and hypothesis not called by it.
    smallest(heads({0: 2}), lambda draw: bool(found.append(gc.isenabled())), 20)
    assert gc.callbacks == before and gc.isenabled()
    assert found and not any(found)


@pytest.mark.parametrize(
    "examples",
    [5, [1, 2], {"heads": 3}, {"heads": {}}, {"heads": {"ids": ["$(id)"], "kept": 1, "seed": 0}}],
)
def test_a_strangers_record_of_draws_is_not_believed(
    examples: Any, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    record = sound_record()
    record.metadata["draws"] = {"asked": 10, "drawn": 10, "examples": examples}
    record.save(tmp_path / "it.safetensors")
    row = audit("--record", tmp_path / "it.safetensors", "-k", "heads_have").row(
        "attention/heads_have_no_order"
    )
    assert row["outcome"] == "error"
    assert "measure again" in row["reason"]
    assert "Error" not in row["reason"] or "(" in row["reason"]


def test_a_ratio_that_is_no_number_is_no_pass(audit: Callable[..., Audit], tmp_path: Path) -> None:
    record = sound_record()
    example = {"ids": [1], "kept": 1, "seed": 0, "layer": 0, "ratio": "nan"}
    record.metadata["draws"] = {"asked": 10, "drawn": 10, "examples": {"heads": example}}
    record.save(tmp_path / "it.safetensors")
    row = audit("--record", tmp_path / "it.safetensors", "-k", "heads_have").row(
        "attention/heads_have_no_order"
    )
    assert (row["outcome"], row["value"]) == ("fail", None)


def test_a_weight_that_is_no_number_ends_in_a_sentence(tmp_path: Path) -> None:
    """What the probe makes of a stream of NaN must not reach those who draw."""
    files = faults.Files(BUNDLED)
    files["W_out"][3, 4] = float("nan")
    target = files.write(tmp_path / "nan")
    record = streamgauge.measure(target, rows=TEXTS, groups=("instrument", "draws"))
    assert "NaN" in record.metadata["failed"]["draws"]
