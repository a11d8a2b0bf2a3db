"""Open a checkpoint directory as a model that is run one decoder layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecompress.arch.inputs import with_rounded_inputs
from moecompress.arch.sites import find_layers
from moecompress.arch.surgery import resize_experts, resized_facts, resized_layer
from moecompress.checkpoint.index import CheckpointIndex, open_index
from moecompress.checkpoint.native import decode, decode_linear
from moecompress.checkpoint.native_check import check_records, comes_from_native, is_native_tensor
from moecompress.checkpoint.native_config import NativeConfig
from moecompress.checkpoint.native_gate import LEAF
from moecompress.checkpoint.native_turns import with_turns
from moecompress.checkpoint.portable import QUANT_METHOD as COMPRESSED_TENSORS
from moecompress.checkpoint.portable import PortableConfig
from moecompress.checkpoint.portable_reader import PortableReader
from moecompress.checkpoint.reader import TensorReader
from moecompress.errors import CheckpointError, NotFinite, UnsupportedModel, message
from moecompress.gate import Gate
from moecompress.stream.agreement import check_agreement
from moecompress.stream.expert_source import ExpertReader, ExpertSource, expert_source
from moecompress.stream.facts import checkpoint_facts
from moecompress.stream.mapping import KeyMap, assemble, build_key_map
from moecompress.stream.skeleton import build_skeleton, load_config, read_config_json, replace_experts
from moecompress.types import ExpertWeights, LayerFacts, LayerWeights, ModelFacts, Weight


@dataclass(frozen=True)
class Resized:
    """The same model with another number of experts per layer: its facts, config.json and module tree."""

    facts: ModelFacts
    raw_config: Mapping[str, Any] = field(repr=False)
    config: Any = field(repr=False)
    skeleton: Any = field(repr=False)


@dataclass(frozen=True)
class StreamModel:
    """A checkpoint and its empty module tree. Weights exist only in what `read_layer` and `read_outer` return."""

    root: Path
    config: Any
    raw_config: Mapping[str, Any]
    facts: ModelFacts
    skeleton: Any = field(repr=False)
    layers_name: str
    index: CheckpointIndex = field(repr=False)
    reader: TensorReader = field(repr=False)
    key_map: KeyMap = field(repr=False)
    expert_sources: Mapping[int, ExpertSource] = field(repr=False)
    native: NativeConfig | None
    tied: Mapping[str, str]  # module name -> the module tensor whose weights it shares
    outer: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)  # read so instead, by name
    resized: Mapping[int, Resized] = field(default_factory=dict, repr=False)  # by number of experts, see stream.resize
    single: dict[tuple[int, int], nn.Module] = field(default_factory=dict, repr=False)  # layers of their own size

    def module_of(self, weights: LayerWeights) -> nn.Module:
        """The empty decoder layer for these weights: its router gives as many ids as they have."""
        layer = self.tree_of(weights).get_submodule(self.layers_name)[weights.index]
        site = self.facts.layers[weights.index].site
        count = weights.choices  # 0: the router alone
        if count in self.resized or site is None or count in (0, site.num_experts):
            return layer  # type: ignore[no-any-return]
        key = (weights.index, count)
        if key not in self.single:
            self.single[key] = resized_layer(layer, site, self.facts.model_type, count)
        return self.single[key]

    def tree_of(self, weights: LayerWeights) -> Any:
        """The empty module tree whose layers have as many experts as these weights, or the source's."""
        other = self.resized.get(weights.choices)
        return self.skeleton if other is None else other.skeleton

    def facts_of(self, weights: LayerWeights) -> LayerFacts:
        """The facts of the layer these weights belong to, with the experts that they have."""
        other = self.resized.get(weights.choices)
        layer = (self.facts if other is None else other.facts).layers[weights.index]
        if layer.site is None:
            return layer
        if weights.choices != layer.site.choices:
            layer = resized_facts(layer, replace(layer.site, num_experts=weights.choices, shared_ids=None))
        assert layer.site is not None
        ids = None if weights.slots is None else weights.choices
        width = weights.experts[0].down.shape[1]
        return replace(layer, site=replace(layer.site, num_experts=len(weights.experts), shared_ids=ids, width=width))

    def model_facts_of(self, weights: LayerWeights) -> ModelFacts:
        """The model's facts with this layer as its weights are, and the others with as many experts per layer."""
        other = self.resized.get(weights.choices)
        facts = self.facts if other is None else other.facts
        layers = (*facts.layers[: weights.index], self.facts_of(weights), *facts.layers[weights.index + 1 :])
        return replace(facts, layers=layers)

    @property
    def compressed(self) -> bool:
        """Whether the checkpoint already is an output of quantization, native or portable."""
        return self.native is not None or isinstance(self.reader, PortableReader)

    @property
    def layers(self) -> nn.ModuleList:
        return self.skeleton.get_submodule(self.layers_name)  # type: ignore[no-any-return]

    def read_layer(self, index: int, *, check: bool = True) -> LayerWeights:
        """All weights of layer `index` in their stored dtypes (native: quantized; portable experts: expanded and
        rounded to their scales' dtype, which is what transformers runs).

        check: raise CheckpointError, naming the tensor, when a float tensor holds NaN or Inf.
        """
        facts = self.facts.layers[index]
        tensors, experts = self.read_tensors(index, check=check), self._read_experts(facts, check)
        return LayerWeights(index, tensors, experts, gate=self._read_gate(facts))

    def _read_gate(self, facts: LayerFacts) -> Gate | None:
        prefix = "" if facts.site is None else f"{facts.name}.{facts.site.experts}"
        layout = None if self.native is None else self.native.gates.get(prefix)
        if layout is None or facts.site is None:
            return None
        return layout.gate(facts.site.hidden, lambda: self.reader.read(f"{prefix}.{LEAF}"))

    def read_tensors(self, index: int, *, check: bool = True) -> dict[str, Weight]:
        """The weights of layer `index` that are no routed experts, by their names inside the layer."""
        facts = self.facts.layers[index]
        tensors: dict[str, Weight] = {}
        for name in facts.roles:
            if name not in tensors:
                tensors.update(self._read_in_layer(facts, name))
        if check:
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    self.check_finite(f"{facts.name}.{name}", value)
        return tensors

    def read_outer(self, name: str) -> Tensor:
        """One tensor outside the layers by its module name (tied names resolve to what they share)."""
        if name in self.outer:
            return self.outer[name]()
        source = name if name in self.key_map.assemblies else self.tied.get(name, name)
        if source not in self.key_map.assemblies:
            raise CheckpointError(message(name, "no tensor of the checkpoint provides it"))
        value = assemble(self.key_map.assemblies[source], self.reader.read, self.skeleton)[source]
        self.check_finite(source, value)
        return value

    def _read_in_layer(self, facts: LayerFacts, name: str) -> dict[str, Weight]:
        full = f"{facts.name}.{name}"
        linear = full.removesuffix(".weight")
        if self.native is not None and linear in self.native.linears:
            row = self.reader.read(f"{linear}.rec0")[0]
            return {name: decode_linear(self.native.linears[linear], row)}
        assembly = self.key_map.assemblies[full]
        if isinstance(self.reader, PortableReader) and assembly.converter is None:
            return {name: self.reader.read_weight(assembly.keys[0])}
        made = assemble(assembly, self.reader.read, self.skeleton)
        found: dict[str, Weight] = {key.removeprefix(facts.name + "."): value for key, value in made.items()}
        for key, value in found.items():
            if tuple(value.shape) != facts.shapes[key]:
                text = f"{list(value.shape)} from {list(self.key_map.assemblies[full].keys)[:3]}"
                raise CheckpointError(message(f"{facts.name}.{key}", text, f"{list(facts.shapes[key])} (config.json)"))
        return found

    def read_experts(self, index: int) -> tuple[ExpertWeights, ...]:
        """The routed experts of layer `index` as they are stored, codes included; () for a dense layer."""
        return self._read_experts(self.facts.layers[index], check=True, coded=True)

    def _read_experts(self, facts: LayerFacts, check: bool, coded: bool = False) -> tuple[ExpertWeights, ...]:
        if facts.site is None:
            return ()
        prefix = f"{facts.name}.{facts.site.experts}"
        if self.native is not None and prefix in self.native.experts:
            return self._read_records(prefix, facts)
        packed = self.reader.read_weight if coded and isinstance(self.reader, PortableReader) else None
        source = ExpertReader(self.expert_sources[facts.index], self.reader.read, self.skeleton, packed)
        experts = []
        for expert in range(facts.site.num_experts):
            weights = source.expert(expert)
            if check:
                for part, value in (("gate_up", weights.gate_up), ("down", weights.down)):
                    if isinstance(value, Tensor):
                        self.check_finite(f"{prefix} expert {expert} {part}", value)
            experts.append(weights)
        return tuple(experts)

    def _read_records(self, prefix: str, facts: LayerFacts) -> tuple[ExpertWeights, ...]:
        assert self.native is not None and facts.site is not None
        layouts = self.native.experts[prefix].records
        slots = self.reader.read(f"{prefix}.slot_map").tolist()
        rows = [self.reader.read(f"{prefix}.rec{k}") for k in range(len(layouts))]
        found = {(k, row): decode(layouts[k], rows[k][row]) for k, row in map(tuple, slots)}
        shared = [found[k, row] for k, row in slots]  # ids may share a record
        turns = self.native.experts[prefix].turns
        experts = with_turns(shared, turns, lambda leaf: self.reader.read(f"{prefix}.{leaf}"))
        if not facts.site.has_bias:
            return experts
        up = self.read_outer(f"{prefix}.{facts.site.gate_up_name}_bias")
        down = self.read_outer(f"{prefix}.down_proj_bias")
        return tuple(replace(e, gate_up_bias=up[i], down_bias=down[i]) for i, e in enumerate(experts))

    def check_finite(self, name: str, value: Tensor) -> None:
        """Raises NotFinite, naming the tensor, when it holds NaN or Inf."""
        if not value.is_floating_point() or not value.numel():
            return
        if all(bound.isfinite() for bound in torch.aminmax(value)):  # no temporaries, unlike isfinite
            return
        bad = int(value.numel() - torch.isfinite(value).sum())
        raise NotFinite(
            message(
                f"{self.root}: {name}",
                f"{bad} of {value.numel()} values are NaN or Inf",
                "finite weights",
                "repair or download the checkpoint again",
            )
        )


def open_model(root: Path, *, trust_remote_code: bool = False, activation_bits: int | None = None) -> StreamModel:
    """Open a Hugging Face or native moecompress checkpoint directory. Reads headers (and slot maps), no weights.

    activation_bits: 8 runs it with inputs of packed matrices rounded to int8 per token; RecipeError where that cannot
    be. Raises CheckpointError (files, contradictions between config and tensors) and UnsupportedModel.
    """
    raw = read_config_json(root)
    config = load_config(root, trust_remote_code=trust_remote_code)
    native, portable, block = _quantization(root, raw)
    if activation_bits is not None:
        native = with_rounded_inputs(native, activation_bits, config.get_text_config().model_type, str(root))
    index = open_index(root)
    reader = TensorReader(index, block=block) if portable is None else PortableReader(index, portable)
    if native is not None:
        check_records(native, index, reader.read)
    skeleton: Any = build_skeleton(config, trust_remote_code=trust_remote_code)
    layers_name, layers = find_layers(skeleton, config.model_type)
    if native is not None:
        _fit_counts(skeleton, native, config.get_text_config().model_type)
    plain = [name for name in reader.names() if native is None or not is_native_tensor(native, name)]
    key_map = build_key_map(skeleton, plain)
    tied = dict(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    facts = checkpoint_facts(root, config, raw, skeleton, layers_name, layers, index)
    sources = {
        layer.index: expert_source(f"{layer.name}.{layer.site.experts}", layer.site, key_map)
        for layer in facts.moe_layers
        if layer.site is not None and (native is None or f"{layer.name}.{layer.site.experts}" not in native.experts)
    }

    def given(name: str) -> bool:
        return name in tied or (native is not None and comes_from_native(native, name))

    check_agreement(root, skeleton, key_map, sources.values(), reader.shape, given)
    for layer in facts.moe_layers:
        if layer.site is not None:
            replace_experts(layers[layer.index], layer.site.experts)
    if native is not None and any(gate.protect for gate in native.gates.values()):
        skeleton.set_attn_implementation("eager")  # other attention never has the probabilities that protect tokens
    return StreamModel(root, config, raw, facts, skeleton, layers_name, index, reader, key_map, sources, native, tied)


def _fit_counts(skeleton: Any, native: NativeConfig, model_type: str) -> None:
    """Give layers that were written with fewer experts than config.json says their own number."""
    modules = dict(skeleton.named_modules())
    for name, layout in native.experts.items():
        experts = modules.get(name)
        if experts is None or experts.down_proj.shape[0] == layout.num_experts:
            continue
        block = modules[name.rpartition(".")[0]]
        resize_experts(block, experts, model_type, experts.down_proj.shape[0], layout.num_experts)


def _quantization(
    root: Path, raw: Mapping[str, Any]
) -> tuple[NativeConfig | None, PortableConfig | None, tuple[int, int] | None]:
    block = raw.get("quantization_config")
    if block is None:
        return None, None, None
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method == "moecompress":
        return NativeConfig.from_json(block), None, None
    if method == COMPRESSED_TENSORS:
        return None, PortableConfig.from_json(block), None
    if method == "fp8" and block.get("weight_block_size"):
        size = block["weight_block_size"]
        if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
            raise CheckpointError(message(str(root / "config.json"), f"weight_block_size {size}", "two sizes"))
        return None, None, (size[0], size[1])
    raise UnsupportedModel(
        message(
            str(root / "config.json"),
            f"the checkpoint is already quantized (quant_method {method!r})",
            "unquantized, FP8 with weight_block_size, or moecompress's native and portable formats",
            "start from the original checkpoint",
        )
    )
