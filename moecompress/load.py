"""Load native checkpoints packed in transformers: importing this module registers quant_method "moecompress".

`import moecompress` does that by itself. Experts and quantized Linears stay in their records; everything else is
loaded by transformers. The renaming below is, besides stream/mapping.py, the only use of its conversion internals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moecompress.arch.inputs import with_rounded_inputs
from moecompress.arch.quirks import router_names
from moecompress.arch.sites import is_experts
from moecompress.arch.surgery import resize_experts
from moecompress.checkpoint.index import CheckpointIndex, open_index
from moecompress.checkpoint.native_check import GUARDS, check_records, comes_from_native, is_native_tensor
from moecompress.checkpoint.native_config import QUANT_METHOD, NativeConfig
from moecompress.checkpoint.native_gate import LEAF
from moecompress.checkpoint.native_turns import PREFIX
from moecompress.checkpoint.reader import TensorReader
from moecompress.dense import hold_large_linears
from moecompress.errors import CheckpointError, RecipeError, UnsupportedModel, message
from moecompress.experts import PackedExperts, PackedLinear
from moecompress.packed import Packed
from moecompress.packed_router import is_packed_router, pack_router, unpack_router
from moecompress.stream.attention import watch_attention
from moecompress.stream.mapping import build_key_map
from moecompress.stream.skeleton import read_config_json

_TOKEN = re.compile("\0\\d+\0")
_LAYER = re.compile(r"(.*\.\d+)\.")  # the decoder layer that a module is in


def load(directory: Path | str, *, dequantize: bool = False, activation_bits: int | None = None, **options: Any) -> Any:
    """The model of a checkpoint directory, in eval mode, of the class its config names.

    Native weights stay packed; dequantize: give transformers' own dense model instead. activation_bits: 8 rounds what
    packed matrices receive to int8 per token while the model runs, which is faster on many processors and changes
    values; None = as the checkpoint says. options: for `from_pretrained` (dtype, device_map, ...; dtype defaults to
    the checkpoint's).
    Raises CheckpointError for files that contradict each other, UnsupportedModel for a class transformers lacks,
    RecipeError for activation_bits that cannot be.
    """
    import transformers

    root = Path(directory)
    block = read_config_json(root).get("quantization_config")
    native = isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD
    if dequantize and block is not None and not native:
        raise CheckpointError(message(str(root), "dequantize=True", f"for quant_method {QUANT_METHOD} or no block"))
    if activation_bits is not None and (dequantize or not native):
        found = "activation_bits, which needs weights that stay packed"
        raise RecipeError(message(str(root), found, "a checkpoint in the native format, not dequantized"))
    trusted = {key: options[key] for key in ("trust_remote_code",) if key in options}
    config = transformers.AutoConfig.from_pretrained(root, **trusted)
    if dequantize and native:
        config.quantization_config["dequantize"] = True
    if activation_bits is not None:
        config.quantization_config["activation_bits"] = activation_bits
    name = (config.architectures or [None])[0]
    auto: Any = transformers.AutoModelForCausalLM
    cls = auto if options.get("trust_remote_code") else getattr(transformers, name or "", auto)
    return cls.from_pretrained(root, config=config, **{"dtype": "auto", **options})


@register_quantization_config(QUANT_METHOD)
class MoecompressConfig(QuantizationConfigMixin):
    """The `quantization_config` block of a native checkpoint. dequantize, activation_bits: as `load` says; never saved.

    transformers ignores a `quantization_config=` argument when the checkpoint has its own, so these two are asked for
    by `moecompress.load(dir, dequantize=True)`, or by setting them in `config.quantization_config` beforehand.
    """

    def __init__(self, dequantize: bool = False, activation_bits: int | None = None, **block: Any) -> None:
        """Raises CheckpointError for a block this version does not write."""
        self.quant_method: Any = QUANT_METHOD  # a plain word: transformers' enumeration cannot be extended
        self.dequantize, self.activation_bits = dequantize, activation_bits
        self.native = NativeConfig.from_json({"quant_method": QUANT_METHOD, **block})

    def to_dict(self) -> dict[str, Any]:
        return self.native.to_json()


@register_quantizer(QUANT_METHOD)
class MoecompressQuantizer(HfQuantizer):
    """Puts packed modules in place of experts and Linears before transformers loads the weights."""

    requires_calibration = True  # transformers' word for: cannot quantize a model while it is loaded

    def __init__(self, quantization_config: MoecompressConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.native = quantization_config.native
        self.names: dict[str, str] = {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(message("from_pretrained", "no files", "a directory with safetensors"))
        root = Path(checkpoint_files[0]).parent
        with torch.device("cpu"):  # transformers builds models under the meta device, where nothing can be read
            index = open_index(root)
            with TensorReader(index) as reader:
                counts = check_records(self.native, index, reader.read)
        if (bits := self.quantization_config.activation_bits) is not None:
            kind = model.config.get_text_config().model_type
            self.native = with_rounded_inputs(self.native, bits, kind, str(root))
        self.names = {name: _module_name(model, name, root) for name in (*self.native.experts, *self.native.linears)}
        if type(model).__name__ in (model.config.architectures or ()):
            _check_complete(model, self.native, index)
        for name in self.native.experts:
            self._pack_experts(model, name, counts[name], root)
        for name, layout in self.native.linears.items():
            linear = model.get_submodule(self.names[name])
            router = self.names[name].rpartition(".")[2] in router_names(model.config.get_text_config().model_type)
            if router and type(linear) is not nn.Linear:
                pack_router(linear, layout, f"{root}: {name}")
                continue
            if type(linear) is not nn.Linear:  # a subclass may use its weight in another way
                raise CheckpointError(message(f"{root}: {name}", type(linear).__name__, "a plain Linear"))
            model.set_submodule(self.names[name], PackedLinear(linear, layout, f"{root}: {name}"))

    def _pack_experts(self, model: Any, name: str, counts: tuple[int, ...], root: Path) -> None:
        module, layout = self.names[name], self.native.experts[name]
        original = model.get_submodule(module)
        if not is_experts(original):
            raise CheckpointError(message(f"{root}: {name}", type(original).__name__, "a module of routed experts"))
        before = original.down_proj.shape[0]
        gate, number = self.native.gates.get(name), layout.num_experts
        where = f"{root}: {name}"
        packed = PackedExperts.packing(original, layout.records, counts, where, number, gate, layout.turns)
        model.set_submodule(module, packed)
        if gate is not None and gate.protect:
            model.set_attn_implementation("eager")  # other attention never has the probabilities that protect tokens
            layer = _LAYER.match(module)
            watch_attention(model if layer is None else model.get_submodule(layer[1]), packed)
        if layout.num_experts != before:
            block = model.get_submodule(module.rpartition(".")[0])
            kind = model.config.get_text_config().model_type
            resize_experts(block, packed, kind, before, layout.num_experts)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Keep the names of native tensors out of the family's renamings, both when loading and when saving."""
        pairs = {}
        for name, module in self.names.items():
            guard = GUARDS["experts" if name in self.native.experts else "linears"]
            for leaf, _ in model.get_submodule(module).named_parameters(recurse=False):
                if leaf in ("guard", "slot_map", LEAF) or leaf.startswith(("rec", PREFIX)):
                    pairs[f"{name}.{guard if leaf == 'guard' else leaf}"] = f"{module}.{leaf}"
        tokens = {stored: f"\0{number}\0" for number, stored in enumerate(pairs)}
        outside, inside = _Names(tokens), _Names({tokens[stored]: held for stored, held in pairs.items()})
        return [outside, *weight_conversions, inside]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        if self.quantization_config.dequantize:
            self._dequantize(model, model.config.dtype)
            return
        hold_large_linears(model)
        for module in model.modules():
            if isinstance(module, Packed) and not any(record.is_meta for record in module.parameters()):
                module.prepare()

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Put the family's own modules back. Called by `model.dequantize()` and for `dequantize=True`."""
        if isinstance(dtype, str):  # what transformers makes of config.dtype when it saves
            dtype = getattr(torch, dtype)
        config = deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        with torch.device("meta"):
            stock = type(model)._from_config(config, dtype=dtype)
        for name, module in self.names.items():
            packed, empty = model.get_submodule(module), stock.get_submodule(module)
            if is_packed_router(packed):
                unpack_router(packed, dtype)
                continue
            if name in self.native.gates:
                found = f"{name} leaves out some of a token's experts, which {type(empty).__name__} cannot"
                raise UnsupportedModel(message("dequantize", found, "a model without prune.otp, .odp and .top_k"))
            if name in self.native.experts:
                if len(packed) != empty.down_proj.shape[0]:
                    found = f"{len(packed)} experts in {name}, {empty.down_proj.shape[0]} in config.json"
                    raise UnsupportedModel(message("dequantize", found, "equal counts", "load it packed"))
                packed.unpack_into(empty, dtype)
            else:
                empty.weight, empty.bias = nn.Parameter(packed.unpacked(dtype)), packed.bias
            model.set_submodule(module, empty.train(model.training))
        model.__dict__.pop("_weight_conversions", None)  # it knows the native names only; the family's own apply now
        return model


class _Names(WeightRenaming):
    """Renames whole keys by a table: to tokens that no pattern matches, or from tokens, whatever was put around."""

    __slots__ = ("table",)

    def __init__(self, table: Mapping[str, str]) -> None:
        super().__init__("\0", "\0")
        self.table = dict(table)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        token = _TOKEN.search(source_key)
        renamed = self.table.get(token[0] if token else source_key)
        if renamed is None:
            return source_key, None
        self._was_used = True  # type: ignore[misc]  # a slot of the base class
        return renamed, "\0"

    def reverse_transform(self) -> _Names:
        return _Names({after: before for before, after in self.table.items()})


def _module_name(model: Any, name: str, root: Path) -> str:
    """`name` in this model: the same, or with its base prefix added or taken off."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in modules:
            return candidate
    raise CheckpointError(message(f"{root}/config.json: {name}", f"{type(model).__name__} has no such module"))


def _check_complete(model: Any, native: NativeConfig, index: CheckpointIndex) -> None:
    """Every tensor of the model has a source, and no module has both dense and packed weights.

    Raises CheckpointError; transformers itself would fill what is missing with random numbers.
    """
    plain = [name for name in index.tensors if not is_native_tensor(native, name)]
    found = build_key_map(model, plain).assemblies
    twice = [found[name].keys[0] for name in found if comes_from_native(native, name)]
    if twice:
        wrong = f"{len(twice)} tensors are stored packed and dense, first {twice[:3]}"
        raise CheckpointError(message(str(index.root), wrong, "once"))
    optional = re.compile("|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing) or r"\Z.")
    missing = [
        name
        for name in model.state_dict()
        if name not in found
        and name not in model.all_tied_weights_keys
        and not comes_from_native(native, name)
        and not optional.search(name)
    ]
    if missing:
        wrong = f"{len(missing)} tensors are missing, first {missing[:3]}"
        raise CheckpointError(message(str(index.root), wrong, then="download the checkpoint again"))
