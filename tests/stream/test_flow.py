"""EASY-EP's token weights on whole models: the residual stream that is seen is the one transformers' own layer has."""

from __future__ import annotations

from pathlib import Path

import engine
import families
import pytest
import torch
from torch import Tensor

from moecompress.errors import UnsupportedModel
from moecompress.stats.base import Statistic
from moecompress.stats.experts import ExpertActivity, TokenContributions, token_weights
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import TokenRun, run_layer
from moecompress.types import MoESite

IDS = engine.random_ids(8, 12)

# family -> the norm whose input is the residual stream, inside a layer
NORMS = {
    "qwen3_moe": "post_attention_layernorm",
    "deepseek_v3": "post_attention_layernorm",
    "gpt_oss": "post_attention_layernorm",
    "gemma4_text": "pre_feedforward_layernorm_2",
    "nemotron_h": "norm",
    "ernie4_5_moe": "post_attention_layernorm",
    "granitemoe": "post_attention_layernorm",
}


def last_site(model: StreamModel) -> tuple[int, MoESite]:
    facts = model.facts.moe_layers[-1]
    assert facts.site is not None
    return facts.index, facts.site


def collect(path: Path, folder: Path, *statistics: Statistic, heldout: float = 0.0) -> tuple[Collector, TokenRun]:
    """The statistics of the last MoE layer, batch by batch."""
    model = open_model(path)
    index, site = last_site(model)
    run = engine.token_run(model, IDS, folder / "hidden", batch_tokens=40, heldout=heldout)
    engine.through_layers(model, run, index)
    collector = Collector(site, statistics, run.tokens.heldout)
    run_layer(model, model.read_layer(index), run, "original", collector=collector, write=False)
    return collector, run


def own_scores(path: Path) -> tuple[Tensor, Tensor]:
    """(EASY-EP score, REAP's sum) [E] of the last MoE layer, from hooks on transformers' own model."""
    source = open_model(path)
    index, site = last_site(source)
    layer = engine.own_model(path)
    decoder = layer.get_submodule(source.facts.layers[index].name)
    seen: dict[str, Tensor] = {}
    decoder.get_submodule(NORMS[source.config.model_type]).register_forward_hook(
        lambda _, args, __: seen.update(residual=args[0].reshape(-1, args[0].shape[-1]))
    )
    experts = decoder.get_submodule(site.experts)
    handle = experts.register_forward_hook(
        lambda _, args, out: seen.update(hidden=args[0], ids=args[1], gates=args[2], routed=out)
    )
    with torch.no_grad():
        layer(input_ids=IDS, use_cache=False)
        handle.remove()
        weight = token_weights(seen["residual"].double(), seen["routed"].double())
        easy, reap = torch.zeros(site.num_experts).double(), torch.zeros(site.num_experts).double()
        for token in range(seen["hidden"].shape[0]):
            for expert, gate in zip(seen["ids"][token].tolist(), seen["gates"][token].tolist(), strict=True):
                one = experts(seen["hidden"][token][None], torch.tensor([[expert]]), torch.ones(1, 1))
                share = gate * float(one.double().norm())
                easy[expert] += share * weight[token]
                reap[expert] += share
    return easy, reap


@pytest.mark.parametrize("model_type", NORMS)
def test_scores_are_those_of_the_models_own_layer(model_type: str, tmp_path: Path) -> None:
    path = families.save_tiny(model_type, tmp_path / "model", torch.float32)
    collector, _ = collect(path, tmp_path, TokenContributions(), ExpertActivity())
    easy, reap = own_scores(path)
    found = collector.finished()
    torch.testing.assert_close(found["token_contributions"]["score"], easy, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["expert_activity"]["powers"][:, 1, 1], reap, rtol=1e-4, atol=1e-6)
    assert int(found["token_contributions"]["tokens"]) == IDS.numel()


def test_held_out_sequences_do_not_count(tmp_path: Path) -> None:
    path = families.save_tiny("qwen3_moe", tmp_path / "model", torch.float32)
    collector, run = collect(path, tmp_path, TokenContributions(), heldout=0.25)
    trained = IDS.shape[0] - len(run.tokens.heldout)
    assert int(collector.finished()["token_contributions"]["tokens"]) == trained * IDS.shape[1] < IDS.numel()


def test_experts_that_read_no_norm_are_refused(tmp_path: Path) -> None:
    path = families.save_tiny("nemotron_h", tmp_path / "model", torch.float32, moe_latent_size=32)
    with pytest.raises(UnsupportedModel, match="read no norm of the residual stream"):
        collect(path, tmp_path, TokenContributions())
