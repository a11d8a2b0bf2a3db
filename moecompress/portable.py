"""The portable format: which results it can hold, what its config block says, and who loads it.

Its facts are those of transformers 5.23, compressed-tensors 0.18 to 0.20, vLLM 0.33 and SGLang 0.5.23.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moecompress.checkpoint.portable import PortableConfig, packed_entries, portable_config
from moecompress.checkpoint.writer import Entry
from moecompress.stream.expert_source import ExpertSource
from moecompress.stream.mapping import KeyMap
from moecompress.stream.model import StreamModel
from moecompress.types import PROJECTIONS, ExpertWeights, MoESite, QuantizedTensor, Scheme, Weight

WIDTHS = (2, 3, 4, 8)
_NUMBERED = re.compile(r"^(.*\.experts)\.\d+\.")


@dataclass(frozen=True)
class Layout:
    """How the source checkpoint names things: for an export of records, not what is stored now."""

    model: StreamModel
    key_map: KeyMap
    sources: Mapping[int, ExpertSource]

    @staticmethod
    def of(model: StreamModel) -> Layout:
        return Layout(model, model.key_map, model.expert_sources)

    @property
    def routed(self) -> frozenset[str]:
        """Checkpoint tensors of routed experts."""
        return frozenset(key for source in self.sources.values() for key in source.checkpoint_keys)


def scheme_problem(scheme: Scheme | None) -> str | None:
    """Why one matrix cannot be stored in the portable format, and the nearest thing that works; None = it can."""
    if scheme is None or scheme.bits == 16:
        return "an expert matrix is not quantized, and all of them must be; quantize them all or use format: native"
    if scheme.binary:
        return (
            "1-bit codes mean -s and +s, which compressed-tensors' 1-bit codes cannot say; "
            "use 2 bits, or format: native and then `moecompress export --format container`"
        )
    if not scheme.symmetric:
        return "zero points: transformers loads no asymmetric experts; use symmetric: true or format: native"
    if scheme.activation != "none":
        return "rounded activations: experts would run with full activations; use format: native"
    if scheme.bits not in WIDTHS:
        return f"{scheme.bits} bits; use one of {WIDTHS} or format: native"
    return None


def layout_problems(layout: Layout) -> list[str]:
    """What in the source checkpoint's layout has no names in compressed-tensors."""
    problems = []
    for index, source in layout.sources.items():
        keys = [key for part in source.projections.values() for expert in part.keys for key in expert]
        kinds = {part.kind for part in source.projections.values()}
        if kinds != {"per_expert"} or any(not key.endswith(".weight") for key in keys):
            key = source.checkpoint_keys[0]
            problems.append(
                f"layer {index} stores its experts together ('{key}'), and compressed-tensors only names single "
                "experts; use format: native or dense"
            )
        elif source.biases:
            problems.append(f"layer {index} has expert biases; use format: native or dense")
    counts = {layer.site.num_experts for layer in layout.model.facts.moe_layers if layer.site is not None}
    if len(counts) > 1:
        problems.append(f"layers have different numbers of experts ({sorted(counts)}); use format: native")
    converted = _lost_in_conversion(layout)
    if converted:
        problems.append(
            f"transformers joins several tensors into '{converted[0]}' and fails to when it expects packed weights; "
            "use format: native or dense"
        )
    return _first(problems)


def _lost_in_conversion(layout: Layout) -> list[str]:
    """Module tensors (no experts) that transformers 5.23 cannot convert in a compressed-tensors checkpoint.

    It puts its expansion of packed weights before every conversion whose sources all end in `.weight`.
    """
    routed = layout.routed
    return [
        target
        for target, assembly in layout.key_map.assemblies.items()
        if assembly.converter is not None
        and not routed.intersection(assembly.keys)
        and all(pattern.endswith(".weight") for pattern in assembly.patterns)
    ]


def portable_problems(model: StreamModel, schemes: Mapping[int, Mapping[str, Scheme]]) -> list[str]:
    """Every reason why a result with these schemes does not fit the portable format exactly; empty = it fits.

    schemes: layer -> {"gate_up", "down", names of linears} -> scheme, as a plan has them.
    """
    problems = layout_problems(Layout.of(model))
    experts = [schemes[layer.index].get(name) for layer in model.facts.moe_layers for name in PROJECTIONS]
    found = [scheme_problem(scheme) for scheme in experts]
    problems += [text for text in dict.fromkeys(found) if text is not None]
    known = set(experts)
    if len(known) > 1 and None not in known:
        widest = max(scheme.bits for scheme in known if scheme is not None)
        other = " and then `moecompress export --format container`" if widest <= 8 else ""
        problems.append(f"mixed bits or groups among the experts; use one scheme for all, or format: native{other}")
    linears = {
        f"{layer.name}.{name}": scheme
        for layer in model.facts.layers
        for name, scheme in schemes[layer.index].items()
        if name not in PROJECTIONS
    }
    problems += [f"{name}: {text}" for name, s in linears.items() if (text := scheme_problem(s))][:1]
    if len(set(linears.values())) > 1:
        problems.append("the other matrices have several schemes; use one for all of them, or format: native")
    converted = [name for name in linears if not _plain_linear(model, name)]
    if converted:
        problems.append(f"'{converted[0]}' is stored in another shape than the module has; leave it out or use native")
    return problems


def _first(problems: Sequence[str]) -> list[str]:
    """The first problem, and how many more layers have one."""
    more = f" (and {len(problems) - 1} more layers)" if len(problems) > 1 else ""
    return [problems[0] + more] if problems else []


def _plain_linear(model: StreamModel, name: str) -> bool:
    assembly = model.key_map.assemblies.get(name)
    return assembly is not None and assembly.converter is None and assembly.keys[0].endswith(".weight")


def expert_matrices(
    source: ExpertSource, experts: Sequence[ExpertWeights]
) -> Iterator[tuple[int, str, str, QuantizedTensor]]:
    """(expert, projection, checkpoint module, matrix) of every per-expert tensor: gate and up apart, expert-major.

    Raises ValueError for a matrix that is not quantized.
    """
    for number, expert in enumerate(experts):
        for name in PROJECTIONS:
            keys = source.projections[name].keys[number]
            weight = expert.projection(name)
            if not isinstance(weight, QuantizedTensor):
                raise ValueError(f"{source.prefix} expert {number} {name} is not quantized")
            rows = weight.shape[0] // len(keys)
            for block, key in enumerate(keys):
                part = slice(block * rows, (block + 1) * rows)
                zeros = None if weight.zeros is None else weight.zeros[part]
                cut = QuantizedTensor(weight.codes[part], weight.scales[part], zeros, weight.scheme)
                yield number, name, key.removesuffix(".weight"), cut


def portable_experts(source: ExpertSource, experts: Sequence[ExpertWeights]) -> list[Entry]:
    """Entries of one layer's routed experts. Raises ValueError for what the format cannot hold."""
    return [entry for _, _, module, part in expert_matrices(source, experts) for entry in packed_entries(module, part)]


def one_scheme(weights: Iterable[Weight]) -> Scheme:
    """The scheme that all these matrices have. Raises ValueError when they differ or are not quantized."""
    found = {weight.scheme if isinstance(weight, QuantizedTensor) else None for weight in weights}
    scheme = next(iter(found))
    problem = scheme_problem(scheme) if len(found) == 1 else f"matrices of {len(found)} kinds, one is allowed"
    if problem is not None or scheme is None:
        raise ValueError(problem)
    return scheme


def config_block(layout: Layout, experts: Scheme, linears: Scheme | None, quantized: Collection[str]) -> PortableConfig:
    """The `quantization_config` of a portable output. quantized: checkpoint modules (not experts) with codes."""
    return portable_config(experts, linears, ignored_modules(layout, quantized))


def ignored_modules(layout: Layout, quantized: Collection[str]) -> list[str]:
    """Every module with a matrix that has no codes, under its checkpoint name and under transformers' own.

    An incomplete list is fatal: engines would look for codes that are not there. The names of checkpoint and module
    tree differ in some families (Mixtral's block_sparse_moe), and modules that only the checkpoint has count too.
    """
    names: dict[str, None] = {}
    routed = layout.routed
    targets = {key: target for target, a in layout.key_map.assemblies.items() for key in a.keys}
    coded = {targets.get(f"{module}.weight", "").removesuffix(".weight") for module in quantized}
    for name, module in layout.model.skeleton.named_modules():
        if isinstance(module, nn.Linear) and name not in coded:
            names[name] = None
    for key in layout.model.reader.names():
        stored, _, leaf = key.rpartition(".")
        if stored in quantized or leaf != "weight" or key in routed:
            continue
        if len(layout.model.reader.shape(key)) != 2:
            continue
        numbered = _NUMBERED.match(key)  # experts of layers that only the checkpoint has, e.g. for drafting
        if numbered:
            names[f"re:{re.escape(numbered[1])}\\.\\d+\\..*"] = None
        else:
            names |= dict.fromkeys((stored, targets.get(key, key).removesuffix(".weight")))
    return list(names)


def portable_schemes(
    model: StreamModel, schemes: Mapping[int, Mapping[str, Scheme]]
) -> tuple[MoESite, Scheme, Scheme | None]:
    """(a MoE site, the experts' scheme, that of the other matrices or None) of a plan that fits."""
    layer = model.facts.moe_layers[0]
    assert layer.site is not None
    linears = [s for chosen in schemes.values() for name, s in chosen.items() if name not in PROJECTIONS]
    return layer.site, schemes[layer.index]["down"], linears[0] if linears else None


def engines(site: MoESite, experts: Scheme, linears: Scheme | None) -> dict[str, dict[str, Any]]:
    """`loadable` of vLLM and SGLang for routed experts of this scheme, by the rules in their code.

    vLLM: `get_moe_method` (compressed_tensors_moe.py) looks at expert 0's gate_proj, up_proj and down_proj, whose
    schemes must be equal. `check_moe_marlin_supports_layer` says which shapes Marlin takes; the others fall back to
    `CompressedTensorsWNA16MoEMethod` (4 and 8 bits, groups only), other widths to the Humming kernels.
    SGLang: `CompressedTensorsWNA16MoE` takes the scheme of the target "Linear", of 4 or 8 symmetric bits, for Marlin.
    """
    return {"vllm": _vllm(site, experts), "sglang": _sglang(site, experts, linears)}


def _marlin_problem(site: MoESite, scheme: Scheme) -> str | None:
    """Why the fused Marlin kernel of both engines does not take these experts; None = it does."""
    step = max(64, scheme.group_size)
    if scheme.bits not in (4, 8):
        return f"Marlin has 4 and 8 bits, not {scheme.bits}"
    if scheme.group_size not in (-1, 32, 64, 128):
        return f"group {scheme.group_size} is none of Marlin's -1, 32, 64, 128"
    if site.hidden % 128 or site.width % step:
        return (
            f"Marlin asks for a hidden size in steps of 128 and a width of {step}, not {site.hidden} and {site.width}"
        )
    return None


def _vllm(site: MoESite, experts: Scheme) -> dict[str, Any]:
    size = experts.group_size
    if size != -1 and (site.hidden % size or site.width % size):
        return _no(f"group {size} must divide hidden {site.hidden} and expert width {site.width}")
    problem = _marlin_problem(site, experts)
    reason = f"pack-quantized, symmetric, {experts.bits} bits, one scheme for gate, up and down of every expert"
    if experts.bits not in (4, 8):
        reason += "; needs the Humming kernels (Marlin has 4 and 8 bits), where negative scales are unverified"
    elif problem is not None and size == -1:
        return _no(f"scales per channel run on Marlin alone, and {problem}; use groups")
    elif problem is not None:
        reason += f"; on slower kernels: {problem}"
    if size != -1:
        step = size if problem else max(64, size)
        reason += f"; tensor parallelism up to {max(1, site.width // step)} ways keeps groups whole"
    return {"status": "by_rule", "reason": f"{reason}. Not run here"}


def _sglang(site: MoESite, experts: Scheme, linears: Scheme | None) -> dict[str, Any]:
    if experts.bits not in (4, 8):
        return _no(f"its experts have 4 or 8 bits, not {experts.bits}; `export --format container` makes 4")
    if linears is not None and linears != experts:
        return _no("it takes the experts' scheme from the group of class Linear, which here is that of other matrices")
    problem = _marlin_problem(site, experts)
    if problem is not None:
        return _no(f"its only kernel on NVIDIA GPUs is Marlin: {problem}")
    reason = f"pack-quantized, symmetric, {experts.bits} bits, one scheme for all experts; Marlin, SiLU experts only"
    return {"status": "by_rule", "reason": f"{reason}. Not run here"}


def _no(reason: str) -> dict[str, Any]:
    return {"status": "no", "reason": reason}
