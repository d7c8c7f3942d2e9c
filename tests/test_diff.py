"""`python -m streamgauge diff`: tokenizers as a whole, the tokens on which two checkpoints part,
divergence, exit codes and JSON.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import transformers as tf

from streamgauge.__main__ import main
from streamgauge.apart import Pair, Parting, parting, search
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.checkpoints.tokenizers import describe_tokenizer
from streamgauge.compare.tokenizers import beyond_the_table, compare_tokenizers
from streamgauge.diff import compare_both
from streamgauge.divergence import Divergence, divergence
from streamgauge.errors import CheckpointError, PromptError
from tests.conftest import ROOT, shared_checkpoint
from tests.faults import Files
from tests.variants import CONFIGS

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
TEXTS = [[1, *random.Random(n).choices(range(512), k=127)] for n in range(10)]


def llama(**more: Any) -> Any:
    return tf.LlamaConfig(**SIZES | more)


def saved(config: Any, folder: Path, change: Callable[[Any], None] | None = None) -> Path:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        if change:
            change(model)
    model.save_pretrained(folder)
    return folder


def pair(old: Path, new: Path) -> Pair:
    return Pair(open_checkpoint(old), open_checkpoint(new), 0.0)


# ---- Where two part


def a_row(model: Any) -> None:
    model.model.embed_tokens.weight[417] *= 1.5


def late_positions(model: Any) -> None:
    model.transformer.wpe.weight[128:] = model.transformer.wpe.weight[128:].flip(0)


def rope(base: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


def found_in(old: Path, new: Path, draws: int = 10) -> Parting:
    found = search(pair(old, new), TEXTS, draws)
    assert found is not None
    return found


def test_a_damaged_row_ends_in_its_token(tmp_path: Path) -> None:
    old, new = saved(llama(), tmp_path / "old"), saved(llama(), tmp_path / "new", a_row)
    found = found_in(old, new)
    assert found.tokens == (417,) and found.layer == -1
    assert str(found).startswith("the two part on the single token 417, from the embedding on (")


def test_a_search_that_has_spent_its_budget_says_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamgauge.apart.SHRINKS", 3)
    old = saved(llama(), tmp_path / "old")
    found = found_in(old, saved(llama(rms_norm_eps=0.1), tmp_path / "new"), 4)
    assert found.ratio > 1


def test_late_positions_end_in_the_first_of_them(tmp_path: Path) -> None:
    config = tf.GPT2Config(**GPT2)
    old = saved(config, tmp_path / "old")
    found = found_in(old, saved(config, tmp_path / "new", late_positions))
    assert len(found.tokens) == 129 and found.layer == -1


def test_a_window_that_was_lost_ends_one_behind_it(tmp_path: Path) -> None:
    old, new = (
        saved(tf.MistralConfig(**SIZES, sliding_window=window), tmp_path / str(window))
        for window in (64, None)
    )
    found = found_in(old, new)
    assert len(found.tokens) == 65 and found.layer == 0


def test_another_rope_base_shows_far_out(tmp_path: Path) -> None:
    old = saved(llama(**rope(1e4)), tmp_path / "old")
    near = found_in(old, saved(llama(**rope(1.01e4)), tmp_path / "near"))
    far = found_in(old, saved(llama(**rope(1.0001e4)), tmp_path / "far"))
    assert 1 < len(near.tokens) < len(far.tokens)


def test_the_same_never_part(tmp_path: Path) -> None:
    old, same = saved(llama(), tmp_path / "old"), saved(llama(), tmp_path / "same")
    assert search(pair(old, same), TEXTS, 10) is None
    rewritten = Files(old)
    rewritten["W_V"], rewritten["W_O"] = 1.7 * rewritten["W_V"], rewritten["W_O"] / 1.7
    assert search(pair(old, rewritten.write(tmp_path / "rewritten")), TEXTS, 10) is None


def test_noise_on_every_weight_is_what_rounding_does(tmp_path: Path) -> None:
    """Not above what is allowed for weights that are off by so much, and far above otherwise."""
    old = saved(llama(), tmp_path / "old")

    def noise(model: Any) -> None:
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.mul_(1 + 2.0**-9 * (2 * torch.rand(parameter.shape) - 1))

    checkpoints = [open_checkpoint(p) for p in (old, saved(llama(), tmp_path / "new", noise))]
    worst = {
        unit: max(Pair(*checkpoints, unit).compare(row).max() for row in TEXTS[:3])
        for unit in (2.0**-9, 0.0)
    }
    assert 1 / 40 < worst[2.0**-9] < 1 < worst[0.0]


def test_tokens_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    old = saved(llama(), tmp_path / "old")
    both = pair(old, old)
    for tokens in ([512], [-1], [], [1] * 257):
        with pytest.raises(PromptError, match="up to 256 tokens with ids below 512"):
            parting(both, tokens)


# ---- Tokenizers


@pytest.fixture
def stories() -> Path:
    return shared_checkpoint("stories260K")


def with_tokenizer(folder: Path, target: Path, change: Callable[[Any, Any, Any], None]) -> Path:
    """A copy, with tokenizer.json, tokenizer_config.json and config.json changed."""
    target.mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, target / path.name)
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    said = [json.loads((target / name).read_text()) for name in names]
    change(*said)
    for name, content in zip(names, said, strict=True):
        (target / name).write_text(json.dumps(content))
    return target


EXTRA = {"id": 600, "content": "<extra>", "special": True}
EXTRA |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TOKENIZERS: dict[str, tuple[Callable[[Any, Any, Any], Any], str, bool]] = {
    "an id beyond the table": (
        lambda t, c, g: t["added_tokens"].append(EXTRA),
        "1 token has an id beyond the embedding's 512 rows, '<extra>' (600) first",
        True,
    ),
    "special tokens lost": (
        lambda t, c, g: [entry.update(special=False) for entry in t["added_tokens"]],
        "3 special tokens are none any more: '</s>', '<s>', '<unk>'",
        True,
    ),
    "another eos": (
        lambda t, c, g: g.update(eos_token_id=5),
        "config.json: eos_token_id 2 in the baseline, now 5",
        True,
    ),
    "another bos": (
        lambda t, c, g: c.update(bos_token="</s>"),
        "bos_token '<s>' in the baseline, now '</s>'",
        True,
    ),
    "a special token's id": (
        lambda t, c, g: t["added_tokens"][1].update(content="<t>"),
        "1 token is new: '<t>'",
        True,
    ),
    "merges": (
        lambda t, c, g: t["model"]["merges"].reverse(),
        "another merges, from rank 0 on",
        True,
    ),
    "a normaliser": (
        lambda t, c, g: t.update(normalizer={"type": "Lowercase"}),
        "the text ",
        True,
    ),
    "a chat template": (lambda t, c, g: c.update(chat_template="{{ x }}"), "chat template", False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_differs_of_a_tokenizer_is_named(name: str, stories: Path, tmp_path: Path) -> None:
    change, says, encodes = TOKENIZERS[name]
    new = with_tokenizer(stories, tmp_path / "new", change)
    found = compare_both(open_checkpoint(stories), open_checkpoint(new))
    named = [one for one in found if says in one.says]
    assert named, [one.says for one in found]
    assert named[0].encodes == encodes


def test_a_part_that_changes_no_text_counts_for_none(stories: Path, tmp_path: Path) -> None:
    new = with_tokenizer(
        stories, tmp_path / "new", lambda t, c, g: t["model"].update(fuse_unk=False)
    )
    found = compare_both(open_checkpoint(stories), open_checkpoint(new))
    assert [(one.says, one.encodes) for one in found] == [("another kind of tokenizer", False)]
    assert not compare_both(open_checkpoint(stories), open_checkpoint(stories))


def test_how_added_tokens_are_matched_and_scores_count(stories: Path, tmp_path: Path) -> None:
    stripped = with_tokenizer(
        stories, tmp_path / "strip", lambda t, c, g: t["added_tokens"][1].update(lstrip=True)
    )
    found = compare_both(open_checkpoint(stories), open_checkpoint(stripped))
    assert found[0].says == "another way to match added tokens"
    described = describe_tokenizer(stories)
    assert described is not None
    scores = [described | {"scores": [["a", score]]} for score in (-1.0, -2.0)]
    (one,) = compare_tokenizers(*scores)
    assert one.says == "another scores of tokens" and one.encodes


def test_tokenizers_that_are_gone_or_none(stories: Path, tmp_path: Path) -> None:
    described = describe_tokenizer(stories)
    assert described is not None and describe_tokenizer(tmp_path) is None
    assert [one.says for one in compare_tokenizers(described, None)] == ["the tokenizer is gone"]
    assert [one.says for one in compare_tokenizers(None, described)] == ["the tokenizer is new"]
    assert compare_tokenizers(None, None) == [] and beyond_the_table(None, 1) is None
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="describes no tokenizer"):
        describe_tokenizer(tmp_path)


# ---- The command


@pytest.fixture
def diffed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        store = ["--store", str(tmp_path / "store")]
        code = main(["diff", *map(str, arguments), *store])
        captured = capsys.readouterr()
        return code, captured.out + (captured.err if code == 4 else "")

    return run


def quantised(folder: Path, target: Path) -> Path:
    """Rounded to 127 levels a row."""
    files = Files(folder)
    for name, tensor in files.tensors.items():
        if tensor.dim() > 1 and ".layers." in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            files.tensors[name] = (tensor / scale).round() * scale
    return files.write(target)


def test_exit_codes_say_whether_the_two_are_the_same(diffed: Any, tmp_path: Path) -> None:
    old = saved(llama(), tmp_path / "old")
    files = Files(old)
    files["W_V"], files["W_O"] = 1.7 * files["W_V"], files["W_O"] / 1.7
    rewritten, few = files.write(tmp_path / "rewritten"), quantised(old, tmp_path / "int8")
    code, out = diffed(old, rewritten)
    assert code == 1 and out.startswith("the same function in other weights: matrices scaled")
    assert out.rstrip().endswith("the two never part, in 20 draws")
    assert diffed(old, rewritten, "--same", "function")[0] == 0
    assert diffed(old, rewritten, "--search", "0")[1].count("never part") == 0
    code, out = diffed(old, few)
    assert code == 1 and out.startswith("a quantisation of it: 21 of 23 matrices")
    assert "KL divergence" in out
    assert diffed(old, few, "--same", "quantised", "--within", "kl=1,flips=1")[0] == 0
    code, out = diffed(old, few, "--same", "quantised", "--within", "kl=1e-9")
    assert code == 1 and out.rstrip().endswith("is above 1e-09")
    assert diffed(old, few, "--same", "function")[0] == 1
    for wrong, says in (("kls=1", "the nearest is kl"), ("kl", "no bound"), ("kl=x", "no bound")):
        code, out = diffed(old, few, "--within", wrong)
        assert code == 4 and says in out
    code, out = diffed(old, few, "--tokens", "1,x")
    assert code == 4 and "no list as 17,3,3" in out


def test_the_found_tokens_are_shown_again_and_tried_first(diffed: Any, tmp_path: Path) -> None:
    old, new = saved(llama(), tmp_path / "old"), saved(llama(), tmp_path / "new", a_row)
    code, out = diffed(old, new)
    assert code == 1 and "1 of 512 rows differ (417): ×1.5" in out.splitlines()[0]
    again = next(line for line in out.splitlines() if line.startswith("again: "))
    assert again.endswith(f"diff {old} {new} --tokens 417")
    assert "the two part on the single token 417" in diffed(old, new, "--tokens", "417")[1]
    assert "the two never part, on these tokens" in diffed(old, new, "--tokens", "416")[1]
    (kept,) = (tmp_path / "store" / "partings").iterdir()
    assert json.loads(kept.read_text()) == [[417]]
    kept.write_text("damaged")
    assert diffed(old, new)[0] == 1


def test_what_was_not_looked_at_is_not_said_to_agree(diffed: Any, tmp_path: Path) -> None:
    old = saved(llama(), tmp_path / "old")
    assert main(["measure", str(old), "-o", str(tmp_path / "old.safetensors")]) == 0
    code, out = diffed(tmp_path / "old.safetensors", old)
    assert code == 0 and "tokenizers were not compared" in out and "part" not in out
    for wrong in (
        (tmp_path / "old.safetensors", old, "--tokens", "5"),
        (old, saved(llama(num_hidden_layers=4), tmp_path / "deeper"), "--search", "5"),
        (old, saved(llama(hidden_size=32), tmp_path / "narrow"), "--tokens", "5"),
    ):
        code, out = diffed(*wrong)
        assert code == 4 and "no tokens can be put to both" in out, out
    for draws in ("-1", "1000000000"):
        code, out = diffed(old, old, "--search", draws)
        assert code == 4 and "is no number of draws; give 0 to 100,000" in out


def test_bounds_on_what_cannot_be_run_leave_the_verdict(diffed: Any, tmp_path: Path) -> None:
    def spoilt(model: Any) -> None:
        model.model.norm.weight[0] = float("nan")

    old, new = saved(llama(), tmp_path / "old"), saved(llama(), tmp_path / "new", spoilt)
    code, out = diffed(old, new, "--within", "kl=1")
    assert code == 1 and out.startswith("damaged: ") and "NaN" in out, out


def test_a_parting_is_no_same_function(
    diffed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(llama(), tmp_path / "old")
    files = Files(old)
    files["W_V"], files["W_O"] = 1.7 * files["W_V"], files["W_O"] / 1.7
    new = files.write(tmp_path / "new")
    monkeypatch.setattr("streamgauge.diff.search", lambda *_: Parting((5,), 0, 99.0))
    code, out = diffed(old, new, "--same", "function")
    assert code == 1
    assert out.startswith("damaged: the two part on the single token 5, from layer 0's output on")


def test_json_is_as_its_schema_says(diffed: Any, tmp_path: Path) -> None:
    schema = json.loads((ROOT / "docs" / "diff.schema.json").read_text())
    old, new = saved(llama(), tmp_path / "old"), saved(llama(), tmp_path / "new", a_row)
    few = quantised(old, tmp_path / "int8")
    bad = Files(old)
    bad["W_out"][3, 4] = float("nan")
    found = {}
    for name, other in (
        ("row", new),
        ("few", few),
        ("old", old),
        ("nan", bad.write(tmp_path / "n")),
    ):
        found[name] = json.loads(diffed(old, other, "--json")[1])
        jsonschema.validate(found[name], schema)
    assert [entry["verdict"] for entry in found.values()] == [
        "damaged",
        "quantised",
        "identical",
        "damaged",
    ]
    assert found["row"]["parting"]["tokens"] == [417]
    assert found["few"]["divergence"]["tokens"] > 0
    assert "NaN or Inf" in found["nan"]["says"]


def test_divergence_is_what_two_plain_models_give(tmp_path: Path) -> None:
    old = saved(llama(), tmp_path / "old")
    few = quantised(old, tmp_path / "int8")
    found = divergence(open_checkpoint(old), open_checkpoint(few), TEXTS[:3])
    logs = []
    for folder in (old, few):
        model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor(TEXTS[:3])).logits[:, :-1].double()
        logs.append(torch.log_softmax(logits, -1).numpy().reshape(-1, 512))
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1)
    target = np.array(TEXTS[:3])[:, 1:].ravel()
    losses = [-log[np.arange(len(target)), target] for log in logs]
    assert found.tokens == len(target) == 381
    assert found.kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.perplexity == pytest.approx(np.exp(losses[1].mean() - losses[0].mean()), rel=1e-6)
    assert found.flips == pytest.approx((logs[0].argmax(1) != logs[1].argmax(1)).mean(), abs=0.003)
    assert Divergence(float("nan"), 1, 1, 0, 1).beyond({"kl": 9.0, "flips": 0.5}) == [
        "kl nan is above 9"
    ]


def test_a_deeper_model_is_another_and_nothing_is_searched(diffed: Any, tmp_path: Path) -> None:
    old = saved(llama(), tmp_path / "old")
    code, out = diffed(old, saved(llama(num_hidden_layers=4), tmp_path / "deeper"))
    assert code == 1 and "part" not in out
    assert out.startswith("another model: 3 layers of width 64 in the baseline, now 4 layers of")


def test_a_text_model_taken_out_of_a_wrapper_is_the_same(diffed: Any, tmp_path: Path) -> None:
    config = CONFIGS["mistral3, vision beside"]()
    torch.manual_seed(0)
    whole = tf.AutoModelForImageTextToText.from_config(config).float().eval()
    text = tf.AutoModelForCausalLM.from_config(config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    text.save_pretrained(tmp_path / "text")
    for sides in (("whole", "text"), ("text", "whole")):
        code, out = diffed(*(tmp_path / side for side in sides))
        assert code == 0 and out.startswith("the same weights, in other files")
        assert "tensors: 0 of 39 differ" in out
