"""Horizons and sublayer effects agree with a slow reference that patches plain Hugging Face modules
by hand.
"""

import gc
from typing import Any

import numpy as np
import pytest
import torch

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.clean_runs import CleanRuns
from streamgauge.engine.forward import PromptRun
from streamgauge.engine.layout import probe_layout
from streamgauge.groups.horizon import Horizons
from streamgauge.groups.sublayer_effect import STRIDE, SublayerEffects
from streamgauge.numerics.horizons import DEFAULT, Variant, all_variants, default_grid
from streamgauge.numerics.rows import Prompts
from tests import models

ROWS = [[1, *range(10 * k, 10 * k + 7)] for k in range(4)]
NAMES = ["gpt2", "gpt-neox-parallel", "gpt-j", "llama", "gemma2", "opt"]


class ByHand:
    """A model whose block inputs are replaced through plain forward hooks; every layer is run every
    time.
    """

    def __init__(self, name: str, model: Any = None) -> None:
        self.model = model or models.random_model(name)
        self.blocks = list(self.model.get_submodule(models.ARCHITECTURES[name].blocks))
        self.ids = torch.tensor(ROWS)
        self.embedding, self.outputs = self._run(lambda layer, x: x, lambda x: x)[:2]
        means = [self._mean(x) for x in [self.embedding, *self.outputs]]
        self.mean_embedding, self.mean_outputs = means[0], means[1:]

    @staticmethod
    def _mean(x: torch.Tensor) -> torch.Tensor:
        mean = torch.zeros_like(x)
        mean[:, 0], mean[:, 1:] = x[:, 0].mean(0), x[:, 1:].mean((0, 1))
        return mean

    def _run(
        self, change: Any, at_end: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Embedding, outputs of all blocks, logits; block inputs go through `change`, the last
        output through `at_end`.
        """
        inputs: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []
        first: list[torch.Tensor] = []
        handles = []
        for layer, block in enumerate(self.blocks):

            def before(module: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
                x = args[0] if args else kwargs["hidden_states"]
                if layer == 0:
                    first.append(x.clone())
                x = change(layer, x)
                inputs.append(x.clone())
                return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

            def after(module: Any, args: Any, output: Any, layer: int = layer) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                self.written.append(x - inputs[layer])
                if layer < len(self.blocks) - 1:
                    return None
                x = at_end(x)
                return (x, *output[1:]) if isinstance(output, tuple) else x

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        with torch.no_grad():
            logits = self.model(self.ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return first[0], self.written, logits

    def loss(self, variant: Variant, k: int) -> np.ndarray:
        """Loss at a horizon, straight from the definition."""
        depth = len(self.blocks)

        def stream(layer: int, outputs: list[torch.Tensor]) -> torch.Tensor:
            within = sum(outputs[max(layer - k, 0) : layer], torch.zeros_like(self.embedding))
            gone = sum(self.mean_outputs[: max(layer - k, 0)], torch.zeros_like(self.embedding))
            embedding = (
                self.embedding
                if variant.embedding == "kept"
                else self.mean_embedding * (variant.fill == "mean")
            )
            return within + embedding + gone * (variant.fill == "mean")

        def is_cut(layer: int) -> bool:
            if variant.reach == "final":
                return layer == depth
            return layer >= max(k, variant.first)

        def change(layer: int, x: torch.Tensor) -> torch.Tensor:
            if not is_cut(layer):
                return self.embedding + sum(self.written, torch.zeros_like(x))
            return stream(layer, self.outputs if variant.streams == "clean" else self.written)

        def at_end(x: torch.Tensor) -> torch.Tensor:
            return (
                stream(depth, self.written)
                if is_cut(depth)
                else self.embedding + sum(self.written, torch.zeros_like(x))
            )

        logits = self._run(change, at_end)[2].double()
        odds = logits[:, :-1].log_softmax(-1).gather(2, self.ids[:, 1:, None])[..., 0]
        return -odds.mean(1).numpy()


@pytest.fixture(autouse=True)
def at_every_position(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Of these models the unembedding is a large part, and few positions would be looked at."""
    if "sparse" not in request.node.name:
        monkeypatch.setattr(CleanRuns, "sparsity", lambda self, unembedded, share: 1)


def _measured(name: str) -> tuple[Any, Any, Prompts]:
    model = models.blockwise(models.random_model(name))
    return model, probe_layout(model), Prompts(ROWS, "test", 1)


def _horizons(model: Any, prompts: Prompts, variants: list[Variant]) -> dict[str, np.ndarray]:
    run = PromptRun(model, prompts, [])
    clean = CleanRuns(run)
    arrays, absent = models.measure_group(model, run, clean, Horizons(clean, variants))
    assert not absent
    return arrays


def _effects(model: Any, layout: Any, prompts: Prompts) -> dict[str, np.ndarray]:
    run = PromptRun(model, prompts, [])
    clean = CleanRuns(run)
    arrays, absent = models.measure_group(model, run, clean, SublayerEffects(layout, clean))
    assert not absent
    return arrays


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_agrees_with_patching_by_hand(name: str) -> None:
    model, layout, prompts = _measured(name)
    variants = all_variants(first=2)
    arrays = _horizons(model, prompts, variants)
    by_hand = ByHand(name)
    np.testing.assert_allclose(
        arrays["clean_loss"], by_hand.loss(Variant(), layout.n_layers + 1), rtol=1e-5
    )
    for variant in variants:
        for number, k in enumerate(arrays["k"]):
            found = arrays[f"loss.{variant.name}"][number]
            np.testing.assert_allclose(
                found,
                by_hand.loss(variant, int(k)),
                rtol=1e-4,
                err_msg=f"{name} {variant.name} {k}",
            )


@pytest.mark.parametrize("n_layers", [1, 2])
def test_shallow_models_are_cut_too(n_layers: int) -> None:
    arrays = _horizons(
        models.blockwise(models.gpt2(n_layers)), Prompts(ROWS, "test", 1), [Variant()]
    )
    by_hand = ByHand("gpt2", models.gpt2(n_layers))
    for found, k in zip(arrays[f"loss.{Variant().name}"], arrays["k"], strict=True):
        np.testing.assert_allclose(
            found, by_hand.loss(Variant(), int(k)), rtol=1e-4, err_msg=str(k)
        )


def test_sparse_losses_are_those_of_every_so_manyth_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, prompts = _measured("gpt2")
    monkeypatch.setattr(CleanRuns, "sparsity", lambda self, unembedded, share: 3)
    found = _horizons(model, prompts, [DEFAULT])
    with torch.no_grad():
        logits = models.random_model("gpt2")(input_ids=torch.tensor(ROWS)).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, 2:-1:3].flatten(0, 1), torch.tensor(ROWS)[:, 3::3].flatten(), reduction="none"
    ).view(len(ROWS), -1)
    np.testing.assert_allclose(found["clean_loss"], losses.mean(1), rtol=1e-5)
    np.testing.assert_array_equal(found["tokens"], losses.shape[1])


def test_sparse_positions_keep_to_their_share_of_a_pass() -> None:
    model, _, prompts = _measured("gpt2")
    clean = CleanRuns(PromptRun(model, prompts, []))
    tokens, positions = sum(map(len, prompts.rows)), sum(len(row) - 1 for row in prompts.rows)
    for unembedded, share in ((14, 0.3), (6, 0.25), (1, 10.0)):
        every = clean.sparsity(unembedded, share)
        cost = unembedded * positions / every * model.head
        assert cost <= share * tokens * (model.n_layers + model.head)
        assert every == 1 or cost * every / (every - 1) > share * tokens * (
            model.n_layers + model.head
        )


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@torch.no_grad()
def test_a_horizon_as_deep_as_the_model_is_the_model(name: str) -> None:
    model, layout, prompts = _measured(name)
    variants = [variant for variant in all_variants(first=1) if variant.embedding == "kept"]
    arrays = _horizons(model, prompts, variants)
    for variant in variants:
        loss = arrays[f"loss.{variant.name}"][arrays["k"] == layout.n_layers][0]
        np.testing.assert_array_equal(loss, arrays["clean_loss"], err_msg=variant.name)


def test_the_default_grid_costs_less_than_eight_forward_passes() -> None:
    for n_layers in (1, 2, 6, 12, 16, 48, 80):
        grid = default_grid(n_layers)
        assert grid[0] == 0 and grid[-2:] == [n_layers, n_layers + 1]
        assert sum(max(0, 1 - k / n_layers) for k in grid if k > 0) <= 6.51


FINAL = {
    "gpt2": ("transformer.ln_f", "lm_head"),
    "gpt-neox-parallel": ("gpt_neox.final_layer_norm", "lm_head"),
    "gpt-j": ("transformer.ln_f", "lm_head"),
    "llama": ("model.norm", "lm_head"),
    "gemma2": ("model.norm", "lm_head"),
    "opt": ("model.decoder.final_layer_norm", "lm_head"),
}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sublayer_effect_agrees_with_full_logits(name: str) -> None:
    blockwise, layout, prompts = _measured(name)
    found = _effects(blockwise, layout, prompts)
    model = models.random_model(name)
    norm, head = (model.get_submodule(part) for part in FINAL[name])
    cap = getattr(model.config, "final_logit_softcapping", None)
    final: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda module, args: final.append(args[0].clone()))
    outputs = models.reference_outputs(model, name, torch.tensor(ROWS))
    ids = torch.tensor(ROWS)

    chosen = torch.arange(0, ids.shape[1] - 1, STRIDE)

    def predictions(normalised: torch.Tensor) -> torch.Tensor:
        logits = head(normalised)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return logits[:, chosen].double().log_softmax(-1)

    clean = final[0]
    full = predictions(norm(clean))
    centred = clean - clean.mean(-1, keepdim=True) if layout.centres else clean
    scale = (centred.double().square().mean(-1, keepdim=True) + layout.epsilon).sqrt()
    for (kind, layer), output in outputs.items():
        without = predictions(norm(clean - output))
        kl = (full.exp() * (full - without)).sum(-1).reshape(-1)
        loss = (full - without).gather(2, ids[:, chosen + 1, None]).reshape(-1)
        np.testing.assert_allclose(
            found[f"{kind}_kl"][layer], kl, atol=1e-5, err_msg=f"{name} {kind} {layer}"
        )
        np.testing.assert_allclose(found[f"{kind}_loss"][layer], loss, atol=1e-5)
        # Frozen: the norm's own arithmetic on an input whose size the last coordinates cannot
        # change.
        own = output - output.mean(-1, keepdim=True) if layout.centres else output
        gained = norm(clean) - norm(torch.zeros_like(clean))
        frozen = predictions(norm(clean) - torch.where(centred != 0, gained / centred, 0) * own)
        np.testing.assert_allclose(
            found[f"{kind}_frozen_kl"][layer],
            (full.exp() * (full - frozen)).sum(-1).reshape(-1),
            atol=1e-4,
        )
        np.testing.assert_allclose(
            found[f"{kind}_size"][layer],
            (own.double().norm(dim=-1) / scale[..., 0])[:, chosen].reshape(-1),
            rtol=1e-5,
        )
    shares = sum(found[f"{kind}_share"].sum(0) for kind in ("attn", "mlp"))
    embedding = clean - sum(outputs.values())
    embedding = embedding - embedding.mean(-1, keepdim=True) if layout.centres else embedding
    rest = ((embedding * centred).sum(-1) / centred.square().sum(-1))[:, chosen].reshape(-1)
    np.testing.assert_allclose(shares + rest.numpy(), 1, atol=1e-5)


@torch.no_grad()
def test_taking_out_a_sublayer_that_writes_nothing_changes_nothing() -> None:
    model = models.random_model("gpt2")
    model.transformer.h[1].mlp.c_proj.weight.zero_()
    model.transformer.h[1].mlp.c_proj.bias.zero_()
    blockwise = models.blockwise(model)
    found = _effects(blockwise, probe_layout(blockwise), Prompts(ROWS, "test", 1))
    for name in ("mlp_kl", "mlp_loss", "mlp_frozen_kl", "mlp_frozen_loss", "mlp_share", "mlp_size"):
        np.testing.assert_array_equal(found[name][1], 0, err_msg=name)
        assert (found[name][[0, 2]] != 0).all()


def test_memory_holds_a_window_for_each_horizon_and_one_variant_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, layout, prompts = _measured("gpt2")
    live: list[int] = []
    step = Blockwise.step

    def watched(*args: Any) -> Any:
        # By type: isinstance would follow other tests' weak references to what is gone.
        found = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
        live.append(sum({storage.data_ptr(): storage.nbytes() for storage in found}.values()))
        return step(*args)

    monkeypatch.setattr(Blockwise, "step", watched)
    gc.collect()  # what other tests left behind
    peaks = []
    for variants in ([Variant()], all_variants(first=1)):
        live.clear()
        _horizons(model, prompts, variants)
        peaks.append(max(live) - live[0])
    one_stream, depth = 4 * len(ROWS) * len(ROWS[0]) * layout.d_model, layout.n_layers
    windows = sum(min(k + 1, depth - k + 1) for k in default_grid(depth) if 0 < k <= depth)
    # Clean streams, what each horizon still looks back at, and what the block at work reads of all
    # of them at once.
    assert peaks[0] < (depth + 1 + windows + 2 * depth) * one_stream
    assert peaks[1] - peaks[0] < 2 * one_stream


def test_rows_of_two_tokens_or_more_are_spread_over_the_prompts() -> None:
    from streamgauge.engine.clean_runs import some_rows

    def prompts(*lengths: int) -> Prompts:
        return Prompts([[0] * n for n in lengths], "rows", None)

    assert some_rows(prompts(1, 2, 1, 3)) == [1, 3]
    assert some_rows(prompts(1, 1)) == []
    assert some_rows(prompts(*[2] * 29)) == list(range(0, 29, 4))
    assert some_rows(prompts(2048, 2048, 2048)) == [0, 2] and some_rows(prompts(5000)) == [0]
