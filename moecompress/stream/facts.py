"""What is known about a checkpoint before any tensor is read: from its configuration, module tree and index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from moecompress.arch.quirks import routing_groups, scoring, top_k
from moecompress.arch.sites import expert_dims, find_site, quantizable_linears, role_of
from moecompress.checkpoint.index import CheckpointIndex, main_dtype
from moecompress.errors import CheckpointError, UnsupportedModel, message
from moecompress.types import LayerFacts, ModelFacts


def checkpoint_facts(
    root: Path,
    config: Any,
    raw: Mapping[str, Any],
    skeleton: Any,
    layers_name: str,
    layers: nn.ModuleList,
    index: CheckpointIndex,
) -> ModelFacts:
    text = config.get_text_config()
    per_token = top_k(text) or top_k(config)
    if per_token is None:
        raise UnsupportedModel(
            message(str(root / "config.json"), "no number of experts per token", "e.g. num_experts_per_tok")
        )
    groups, chosen = routing_groups(text)
    made = []
    for position, layer in enumerate(layers):
        name = f"{layers_name}.{position}"
        site = find_site(layer, name, text.model_type, per_token)
        if site is not None:
            site = replace(site, groups=groups, top_groups=chosen)
        if site is not None and site.num_experts < per_token:
            found = f"{per_token} experts per token"
            raise CheckpointError(
                message(str(root / "config.json"), found, f"at most {site.num_experts}, all there are")
            )
        shapes = {
            key: tuple(value.shape)
            for key, value in layer.state_dict().items()
            if site is None or not key.startswith(site.experts + ".")
        }
        roles = {key: role_of(key, site, shape) for key, shape in shapes.items()}
        linears = quantizable_linears(layer, site)
        made.append(LayerFacts(position, name, site, roles, shapes, linears, expert_dims(shapes, site)))
    return ModelFacts(
        model_type=config.model_type,
        architecture=type(skeleton).__name__,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        dtype=main_dtype(index),
        layers=tuple(made),
        source_bytes=index.total_bytes,
        config=raw,
        scoring=scoring(text),
    )
