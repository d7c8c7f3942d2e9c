"""The search for repairs: parts of blocks, what undoes what, gradients a block at a time, and what
is said of a checkpoint with a fault, without one, and untrained.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from streamgauge.engine.clean_runs import token_losses
from streamgauge.engine.gradients import loss_gradient, through_block
from streamgauge.engine.parts import Parts
from streamgauge.engine.repairs import REPAIRS, repaired, repairs_of
from streamgauge.engine.variants import in_place, logits_of, variants_of
from streamgauge.groups import neighbours
from streamgauge.groups.neighbours import Search, Text, measure_neighbours
from streamgauge.numerics import neighbours as numerics
from streamgauge.numerics.names import layer_of
from streamgauge.numerics.neighbours import (
    KINDS,
    cause,
    findings,
    is_foreign,
    said,
    upper_bounds,
)
from streamgauge.numerics.rows import Prompts
from tests import faults, models
from tests.conftest import ROOT, Audit

Auditing = Callable[..., Audit]
LAW = "invariants/predictions/test_best_of_its_neighbours.py"
BUNDLED = ROOT / "fixtures" / "bundled" / "pystdlib-3m"
MHA = {"W_Q", "W_K", "W_V", "W_O"}
ROLES = {  # of one block, by architecture
    "gpt2": MHA | {"W_in", "W_out", "ln1", "ln2"},
    "gpt-neox-parallel": MHA | {"W_in", "W_out", "ln1", "ln2"},
    "gpt-j": MHA | {"W_in", "W_out", "ln1", "ln2"},
    "opt": MHA | {"W_in", "W_out", "ln1", "ln2"},
    "llama": MHA | {"W_in", "W_gate", "W_out", "ln1", "ln2"},
    "gemma3": MHA | {"W_in", "W_gate", "W_out", "ln1", "ln1_post", "ln2", "ln2_post"},
    "phi3": MHA | {"W_in", "W_gate", "W_out", "ln1", "ln2"},
    "mixtral": MHA | {"ln1", "ln2"},
}
UNDONE_BY = {
    "rotary from pairs": "rotary to pairs",
    "heads from tiled": "heads to tiled",
    "W_O heads up": "W_O heads down",
    "W_K and W_V heads up": "W_K and W_V heads down",
    "ln1 gain +1": "ln1 gain -1",
    "ln2 gain +1": "ln2 gain -1",
    "Q K V from KVQ": "Q K V from VQK",
}
OWN_INVERSE = [
    kind
    for kind in REPAIRS
    if kind.endswith((" sign", " transposed", " reversed", "W_in", " gains"))
    or kind in ("Q K V from KQV", "Q K V from QVK", "Q K V from VKQ", "ln1 ln2")
]
IDS = torch.tensor([[1, *range(10 * k, 10 * k + 7)] for k in range(3)])
COUNTED = torch.ones(3, 7)


def parts_of(model: Any, layer: int = 1) -> Parts:
    config = model.mapped.model.config.get_text_config()
    return Parts(model.blocks[layer], model.anatomies[layer], config)


def noisy(name: str) -> Any:
    """A model of which no gain, bias or matrix is like another."""
    model = models.random_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return models.blockwise(model)


def test_every_kind_of_change_has_its_words() -> None:
    blockwise = {kind for kind, known in KINDS.items() if kind not in REPAIRS}
    assert blockwise == {"without attn", "without mlp", "without layer", "layers exchanged"}
    assert REPAIRS.keys() <= KINDS.keys()


@pytest.mark.parametrize("name", ROLES)
@torch.no_grad()
def test_parts_are_found_whatever_they_are_called(name: str) -> None:
    model = noisy(name)
    with model.held(1):
        parts = parts_of(model)
        roles = {role for role in parts.places if not role.startswith("b_") and " " not in role}
        assert roles == ROLES[name]
        assert parts.n_heads == 4 and parts["W_Q"].shape[1] == parts["W_O"].shape[0] == 32


@torch.no_grad()
def test_a_fused_matrix_is_taken_apart_as_the_model_does() -> None:
    """W_V alone decides what is written: without it, attention writes its output bias."""
    for name in ("gpt2", "gpt-neox-parallel", "phi3", "bloom"):
        model = noisy(name)
        batch = model.enter(IDS)
        model.step(batch, 0)
        with model.held(1):
            parts, (term,) = parts_of(model), model.anatomies[1].of("attn")
            seen = []
            module = model.module(1, term.path)
            hook = module.register_forward_hook(lambda m, a, out, s=seen: s.append(out))
            roles = [role for role in ("W_V", "b_V") if role in parts]
            with parts.having({role: torch.zeros_like(parts[role]) for role in roles}):
                model.step(batch, 1)
            hook.remove()
        written = (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(-1, 32)
        if name == "bloom":  # which adds the stream inside
            continue
        assert torch.allclose(written, written[:1].expand_as(written), atol=1e-6), name


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-parallel", "llama", "gemma3", "phi3"])
@torch.no_grad()
def test_a_repair_undoes_the_fault(name: str) -> None:
    model = noisy(name)
    pairs = UNDONE_BY | {b: a for a, b in UNDONE_BY.items()} | {k: k for k in OWN_INVERSE}
    with model.held(1):
        parts = parts_of(model)
        sound = {role: parts[role].clone() for role in parts.places}
        tried = set(repairs_of(parts))
        for kind in tried & pairs.keys():
            with parts.having(repaired(kind, parts)):
                assert any(not torch.equal(parts[role], sound[role]) for role in sound), kind
                with parts.having(repaired(pairs[kind], parts)):
                    for role, value in sound.items():
                        assert torch.allclose(parts[role], value, atol=1e-6), (kind, role)
        assert all(torch.equal(parts[role], sound[role]) for role in sound)
    rotary = {"rotary from pairs", "rotary to pairs"}
    assert rotary <= tried if name != "gpt2" else not rotary & tried
    assert ("W_gate W_in" in tried) == (name in ("llama", "gemma3", "phi3"))
    assert ("heads from tiled" in tried) == (name in ("llama", "gemma3", "phi3"))


@torch.no_grad()
def test_a_gain_left_out_is_one_whatever_is_stored() -> None:
    for name, stored in (("llama", 1.0), ("gemma3", 0.0)):
        model = noisy(name)
        with model.held(1):
            parts = parts_of(model)
            assert float(repaired("ln1 gain as 1", parts)["ln1"].unique()) == stored


@torch.no_grad()
def test_a_gain_is_taken_out_of_the_matrix_that_it_was_folded_into() -> None:
    for name in ("llama", "gemma3", "phi3"):
        model = noisy(name)
        with model.held(1):
            parts = parts_of(model)
            sound, gain = parts["W_in"].clone(), parts["ln2"] + parts.added["ln2"]
            with parts.having({"W_in": sound * gain}):
                assert "W_in over ln2" in set(repairs_of(parts))
                found = repaired("W_in over ln2", parts)
            assert found.keys() == {"W_in"}
            assert torch.allclose(found["W_in"], sound, atol=1e-5)
    with (model := noisy("gpt2")).held(1):
        assert "W_in over ln2" not in set(repairs_of(parts_of(model)))  # the gain as 1 does as much


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox-parallel", "mixtral"])
def test_gradients_are_those_of_the_whole_model(name: str) -> None:
    model, plain = noisy(name), models.random_model(name)
    plain.load_state_dict({n: t.clone() for n, t in model.mapped.stored.items()}, strict=False)
    streams: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        streams.append(stream)
        stream.retain_grad()

    for block in plain.get_submodule(models.ARCHITECTURES[name].blocks):
        block.register_forward_pre_hook(keep, with_kwargs=True)
    plain.requires_grad_(True)
    logits = plain(input_ids=IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten(), reduction="sum").backward()

    with torch.no_grad():
        batch = model.enter(IDS)
        own = [batch.stream.clone()]
        for layer in range(model.n_layers):
            with model.held(layer):
                own.append(model.step(batch, layer).clone())
        gradient = loss_gradient(model, IDS, own[-1], COUNTED)
        for layer in reversed(range(model.n_layers)):
            with model.held(layer):
                gradient, inside = through_block(model, layer, batch, own[layer], gradient)
            assert torch.allclose(gradient, streams[layer].grad, rtol=1e-3, atol=1e-5), layer
            assert inside is not None and inside.shape == gradient.shape


@torch.no_grad()
def test_rows_of_other_lengths_do_not_change_a_row() -> None:
    model = noisy("llama")
    rows = [[1, *range(5, 5 + n)] for n in (3, 9, 30)]
    text = Text(rows, rows, "rows")
    search = Search(model, text, to_the_end=False, show=False)
    together = search._run_blocks([], *search._padded(rows))
    alone = [float(search._run_blocks([], *search._padded([row]))[0]) for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    logits = model.mapped.model(input_ids=torch.tensor(rows[2:])).logits[0, :-1]
    plain = torch.nn.functional.cross_entropy(logits, torch.tensor(rows[2][1:]), reduction="sum")
    assert together[2] == pytest.approx(float(plain), rel=1e-5)


@torch.no_grad()
def test_a_candidate_runs_as_a_model_that_was_changed_so() -> None:
    """Every change of every block, against the plain model with its weights changed."""
    model = noisy("llama")
    rows = [[1, *range(5 + n, 20 + n)] for n in range(4)]
    search = Search(model, Text(rows, rows, "rows"), to_the_end=True, show=False)
    kinds = ["W_gate W_in", "W_O transposed", "ln1 ln2", "rotary to pairs", "without mlp"]
    chosen = [neighbours.Candidate(kind, layer) for kind in kinds for layer in (0, 2)]
    chosen += [
        neighbours.Candidate("layers exchanged", 0),
        neighbours.Candidate("without layer", 1),
    ]
    search._run_blocks(chosen, *search._padded(rows))
    for candidate in chosen:
        plain = models.random_model("llama")
        plain.load_state_dict({n: t.clone() for n, t in model.mapped.stored.items()}, strict=False)
        _change(plain, candidate.kind, candidate.layer)
        ids = torch.tensor(rows)
        logits = plain(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        np.testing.assert_allclose(
            candidate.values[0], losses.view(4, -1).sum(1), rtol=1e-5, err_msg=candidate.kind
        )


def _change(model: Any, kind: str, layer: Any) -> None:
    blocks = model.model.layers
    block = blocks[layer]
    if kind == "layers exchanged":
        one, other = (dict(b.state_dict()) for b in (block, blocks[layer + 1]))
        one, other = ({n: t.clone() for n, t in state.items()} for state in (one, other))
        block.load_state_dict(other)
        blocks[layer + 1].load_state_dict(one)
    elif kind == "without layer":
        block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    elif kind == "without mlp":
        block.mlp.down_proj.weight.zero_()
    elif kind == "W_gate W_in":
        gate, up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
        kept = gate.clone()
        gate.copy_(up)
        up.copy_(kept)
    elif kind == "W_O transposed":
        block.self_attn.o_proj.weight.copy_(block.self_attn.o_proj.weight.T.clone())
    elif kind == "ln1 ln2":
        one, other = block.input_layernorm.weight, block.post_attention_layernorm.weight
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
    elif kind == "rotary to pairs":
        for weight in (block.self_attn.q_proj.weight, block.self_attn.k_proj.weight):
            heads = weight.view(-1, 2, 4, 32).transpose(1, 2)
            weight.copy_(heads.reshape(weight.shape).clone())


@torch.no_grad()
@pytest.mark.parametrize("every", [2, 3])
def test_losses_of_some_positions_are_those_of_all(every: int) -> None:
    """Where the vocabulary is large they are read off every second or third position alone."""
    model = noisy("gpt2")
    batch = models.run(model, IDS)
    losses = token_losses(model, IDS, batch.stream)
    few = token_losses(model, IDS, batch.stream, every)
    np.testing.assert_allclose(few, losses[:, every - 1 :: every], rtol=1e-5)
    some = logits_of(model.mapped, IDS, every)
    assert torch.allclose(some, logits_of(model.mapped, IDS)[:, every - 1 :: every], atol=1e-5)
    assert token_losses(model, IDS[:, :1], batch.stream[:, :1]).shape == (len(IDS), 0)


@torch.no_grad()
def test_a_large_vocabulary_is_read_off_few_positions() -> None:
    model = noisy("llama")
    rows = [[1, *range(5, 35)]] * 30
    search = Search(model, Text(rows, rows, "rows"), to_the_end=False, show=False)
    assert search.every == 1
    search.every = 3
    ids, counted = search._padded(rows[:2])
    assert counted.shape == (2, 10)
    assert search._run_blocks([], ids, counted).shape == (2,)


@torch.no_grad()
def test_a_variant_runs_as_transformers_runs_it() -> None:
    model = noisy("gpt2")
    by_name = {variant.name: variant for variant in variants_of(model.mapped)}
    assert "config.json with scale_attn_weights False" in by_name
    wpe = model.mapped.stored["transformer.wpe.weight"]
    sound = logits_of(model.mapped, IDS)
    for name, change in (
        ("config.json with activation_function relu", {"activation_function": "relu"}),
        ("config.json with n_head 8", {"n_head": 8}),
        ("the position table moved by 1 row", {}),
    ):
        plain = models.random_model("gpt2")
        config = type(plain.config)(**plain.config.to_dict() | change)
        config._attn_implementation = "eager"
        other = type(plain)(config).eval()
        state = {n: t.clone() for n, t in model.mapped.stored.items()}
        if not change:
            state["transformer.wpe.weight"] = wpe.roll(1, 0)
        other.load_state_dict(state, strict=False)
        with in_place(model.mapped, by_name[name]) as changed:
            found = logits_of(changed, IDS)
        assert torch.allclose(found, other(input_ids=IDS).logits[:, :-1], atol=1e-4), name
        assert not torch.allclose(found, sound, atol=1e-3)
    assert torch.equal(logits_of(model.mapped, IDS), sound)


@torch.no_grad()
def test_all_candidates_are_run_to_the_end_where_that_is_asked_for() -> None:
    model = noisy("llama")
    dice = np.random.default_rng(0)
    rows = dice.integers(4, 97, (26, 12)).tolist()
    text = Text(rows[:4], rows[4:], "rows")
    (arrays, absent), found = measure_neighbours(
        model, text, Prompts(rows, "rows", None), to_the_end=True
    )
    assert not absent and found["search"] == "all"
    assert len(arrays["change"]) == len(found["kinds"]) == sum(found["tried"].values())
    assert found["tried"]["W_gate W_in"] == 3 and found["tried"]["layers exchanged"] == 2


@pytest.mark.parametrize(
    ("shape", "times"), [("normal", 1), ("heavy tails", 1), ("exponential", 3), ("left", 1)]
)
def test_a_search_raises_no_alarm_by_chance(
    shape: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes of a sound model that cost nothing on average: how often a bound lies below 0."""
    level, n, draws = numerics.FALSE_ALARM / numerics.LOOKS, 64, 60_000
    monkeypatch.setattr(numerics, "FALSE_ALARM", level * numerics.LOOKS * draws)
    dice = np.random.default_rng(0)
    values = {
        "normal": lambda: dice.standard_normal((draws, n)),
        "heavy tails": lambda: dice.standard_t(2.5, (draws, n)),
        "exponential": lambda: dice.exponential(size=(draws, n)) - 1,
        "left": lambda: 1 - dice.exponential(size=(draws, n)),
    }[shape]()
    mean, spread = values.mean(1), values.std(1)
    skew = ((values - mean[:, None]) ** 3).mean(1) / spread**3
    bounds = upper_bounds(mean, spread / (n - 1) ** 0.5, np.full(draws, n), skew)
    alarms = np.mean(bounds < 0)
    assert alarms < times * level + 4 * (times * level / draws) ** 0.5


def test_a_bound_is_student_s_where_nothing_is_skewed() -> None:
    change, error, rows = np.array([-1.0, 0.2]), np.array([0.1, 0.1]), np.array([60, 20])
    bounds = upper_bounds(change, error, rows, np.zeros(2))
    expected = change + stats.t.ppf(1 - 1e-3 / 4, rows - 1) * error
    np.testing.assert_allclose(bounds, expected, rtol=1e-6)
    assert (upper_bounds(change, error, rows, np.ones(2)) > bounds).all()


def test_a_repair_that_does_no_better_than_nothing_at_all_is_none() -> None:
    kinds, layers = ["W_gate W_in", "without mlp", "W_O sign"], np.array([3, 3, 2])
    certain = np.array([True, True, False])
    assert findings(kinds, layers, np.array([-0.2, -0.1, -0.3]), certain) == [0, 1]
    assert findings(kinds, layers, np.array([-0.1, -0.2, -0.3]), certain) == [1]


def test_what_is_said_of_a_repair() -> None:
    line = said("W_gate W_in", 12, -0.189, 0.0133, 3810)
    assert line == (
        "layer 12 mlp: with gate and up exchanged the loss is 0.189 nats a token lower (t -14.2, "
        "3,810 tokens)"
    )
    assert cause("W_gate W_in", -0.189, 0.02) == "they are probably exchanged in the file"
    for kind, slope in (("W_gate W_in", -0.1), ("W_gate W_in", 0.1), ("without mlp", 0.0)):
        assert "is not known" in cause(kind, -0.189, slope)
    assert is_foreign(-0.1, 1.3) and not is_foreign(-0.1, 0.9) and not is_foreign(-6.0, 1.3)
    assert said("config.json with n_head 4", -1, -1, 0.1, 9).startswith("the whole model: with")


def test_a_fault_is_found_and_named_without_a_baseline(audit: Auditing, tmp_path: Path) -> None:
    """One of them; docs/neighbours.md has all, and tests/real another."""
    files = faults.Files(BUNDLED, 15)
    next(fault for fault in faults.FAULTS if fault.name == "queries for keys").change(files)
    found = audit("--model", files.write(tmp_path / "faulty"), laws=LAW, neighbours=None)
    row = found.rows[0]
    assert found.exit == 1 and row["outcome"] == "fail"
    assert "layer 15 attn: with W_Q, W_K and W_V read as W_K, W_Q, W_V" in row["reason"]
    assert "probably" in row["reason"] and row["value"] < -0.01


def test_a_sound_checkpoint_has_no_better_neighbour(audit: Auditing) -> None:
    found = audit("--model", BUNDLED, laws=LAW, neighbours=None)
    assert found.exit == 0 and found.rows[0]["outcome"] == "pass"


def test_an_untrained_model_has_nothing_to_spoil(audit: Auditing, tmp_path: Path) -> None:
    model = models.gpt2(n_layers=2)
    folder = models.save(model, tmp_path / "untrained")
    row = audit("--model", folder, laws=LAW, neighbours=None).rows[0]
    assert row["outcome"] == "not_applicable" and "no text that it was trained for" in row["reason"]
    files = faults.Files(BUNDLED)
    files.config["n_layer"] = 3
    beyond = [name for name in files.tensors if (layer_of(name) or 0) > 2]
    generator = torch.Generator().manual_seed(0)
    for tensor_name, tensor in files.tensors.items():
        if tensor.dim() > 1:
            files.tensors[tensor_name] = 0.02 * torch.randn(tensor.shape, generator=generator)
    for tensor_name in beyond:
        del files.tensors[tensor_name]
    random = files.write(tmp_path / "random")
    row = audit("--model", random, laws=LAW, neighbours=None).rows[0]
    assert row["outcome"] == "not_applicable" and "no better than counting tokens" in row["reason"]


def test_text_of_another_kind_raises_no_alarm(audit: Auditing, tmp_path: Path) -> None:
    """The bundled model knows Python's documentation; on other English half of its layer 5 does
    harm.
    """
    prompts = ROOT / "streamgauge" / "checkpoints" / "prompts.txt"
    row = audit("--model", BUNDLED, "--prompts", prompts, laws=LAW, neighbours=None).rows[0]
    assert row["outcome"] == "not_applicable" and "is not of the kind" in row["reason"], row


def test_the_search_can_be_left_out(audit: Auditing, tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLED, tmp_path / "copy")
    row = audit("--model", folder, laws=LAW).rows[0]
    assert row["outcome"] == "not_applicable" and "--neighbours none" in row["reason"]
