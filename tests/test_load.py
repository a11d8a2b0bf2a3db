"""Native checkpoints in transformers: packed loading, saving, dequantizing, and everything that must be refused.

Oracles: the same rounding done on the tensors of the family's own dense model, and the streamed forward.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moecompress
from moecompress.arch.quirks import UNSUPPORTED
from moecompress.checkpoint.native_config import NativeConfig
from moecompress.checkpoint.writer import write_index, write_shard
from moecompress.errors import CheckpointError, UnsupportedModel
from moecompress.experts import PackedExperts, PackedLinear
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.settle import settle
from moecompress.stream.inventory import owners
from moecompress.stream.model import StreamModel, open_model
from moecompress.stream.streams import final_logits, run_layer, start_run
from moecompress.types import ExpertWeights, LayerWeights, Projection, Scheme, TokenSet, Weight
from moecompress.writing import Written, layer_output, outer_output

SUPPORTED = [name for name in families.FAMILIES if name not in UNSUPPORTED]
ALL = range(families.LAYERS)
LINEARS = Scheme(4)
IDS = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
TOLERANCE = 5e-6  # relative, float32: sums in another order, exponentials of another library


def scheme_of(expert: int, projection: Projection) -> Scheme | None:
    """Several layouts in every layer, one of them with an unquantized matrix (None)."""
    if projection == "gate_up":
        return Scheme((2, 3, 4, 8)[expert % 4], 32)
    return (Scheme(4, 16, False, "int"), None, Scheme(1, -1, binary=True))[expert % 3]


def rounded(weight: Tensor, scheme: Scheme | None) -> Weight:
    return weight if scheme is None else round_to_nearest(weight.float(), scheme)


def quantized(expert: ExpertWeights, number: int) -> ExpertWeights:
    assert isinstance(expert.gate_up, Tensor) and isinstance(expert.down, Tensor)
    up, down = (
        rounded(expert.gate_up, scheme_of(number, "gate_up")),
        rounded(expert.down, scheme_of(number, "down")),
    )
    return ExpertWeights(up, down, expert.gate_up_bias, expert.down_bias)


def write_native(
    source: Path,
    target: Path,
    *,
    experts: Collection[int] = ALL,
    linears: Collection[int] = (3,),
    keep: tuple[int, ...] = (),
) -> Path:
    """Quantize a checkpoint as the engine does. experts, linears: layers; keep: prune the experts to these."""
    model = open_model(source)
    owned = owners(model)
    target.mkdir()
    parts: list[Written] = [outer_output(model, lambda key: owned[key].layer is not None)]
    for index in range(len(model.layers)):
        original = model.read_layer(index)
        weights = original
        if index in experts:
            weights = weights.with_experts(tuple(quantized(e, n) for n, e in enumerate(original.experts)))
        if keep and original.experts:
            weights = pruned(model, weights, keep)
        if index in linears:
            names = model.facts.layers[index].linears
            weights = weights.with_tensors({name: rounded(dense(original, name), LINEARS) for name in names})
        parts.append(layer_output(model, original, settle(weights, original, "native"), "native"))
    records = [write_shard(target / f"model-{n:05d}.safetensors", part.entries) for n, part in enumerate(parts)]
    write_index(target, records)
    native = NativeConfig(
        {name: layout for part in parts for name, layout in part.experts.items()},
        {name: layout for part in parts for name, layout in part.linears.items()},
    )
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": native.to_json()}))
    return target


def dense(weights: LayerWeights, name: str) -> Tensor:
    value = weights.tensors[name]
    assert isinstance(value, Tensor)
    return value


def pruned(model: StreamModel, weights: LayerWeights, keep: tuple[int, ...]) -> LayerWeights:
    facts = model.facts.layers[weights.index]
    assert facts.site is not None
    number, changed = facts.site.num_experts, {}
    for name, role in facts.roles.items():
        shape = list(dense(weights, name).shape)
        if role == "router" and number in shape:
            kept = dense(weights, name).index_select(shape.index(number), torch.tensor(keep))
            changed[name] = kept.contiguous()
    return weights.with_experts(tuple(weights.experts[k] for k in keep)).with_tensors(changed)


def rounded_dense(source: Path, *, experts: Collection[int] = ALL, linears: Collection[int] = (3,)) -> Any:
    """The family's own model with the same rounding done on its own tensors."""
    model = moecompress.load(source, dtype=torch.float32)
    for layer in open_model(source).facts.layers:
        with torch.no_grad():
            if layer.site is not None and layer.index in experts:
                stacks: dict[Projection, str] = {"gate_up": layer.site.gate_up_name, "down": "down_proj"}
                for projection, leaf in stacks.items():
                    stack = model.get_parameter(f"{layer.name}.{layer.site.experts}.{leaf}")
                    for expert, matrix in enumerate(stack.mT if layer.site.transposed else stack):
                        if (scheme := scheme_of(expert, projection)) is not None:
                            matrix.copy_(dequantize(round_to_nearest(matrix.contiguous(), scheme)))
            for name in layer.linears if layer.index in linears else ():
                weight = model.get_parameter(f"{layer.name}.{name}")
                weight.copy_(dequantize(round_to_nearest(weight, LINEARS)))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


def streamed(root: Path, folder: Path) -> Tensor:
    model = open_model(root)
    run = start_run(model, TokenSet("t", IDS, {}, ""), folder, batch_tokens=512, streams=("original",))
    for index in range(len(model.layers)):
        run_layer(model, model.read_layer(index), run, "original")
    return torch.cat([values for _, values in final_logits(model, run, "original")])


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def tensors_of(root: Path) -> dict[str, Tensor]:
    return {name: value for file in root.glob("*.safetensors") for name, value in load_file(file).items()}


def rewrite(native: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """A copy of a native checkpoint, in one file, with tensors and config changed."""
    target.mkdir()
    tensors, config = tensors_of(native), json.loads((native / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def packed_modules(model: Any) -> tuple[int, int]:
    modules = list(model.modules())
    return sum(isinstance(m, PackedExperts) for m in modules), sum(isinstance(m, PackedLinear) for m in modules)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dense source, native) of one family in float32."""
    root = tmp_path_factory.mktemp("mixtral")
    source = families.save_tiny("mixtral", root / "source", torch.float32)
    return source, write_native(source, root / "native")


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_runs_packed_as_rounded(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    source = families.save_tiny(family, tmp_path / "source", torch.float32)
    native = write_native(source, tmp_path / "native")
    auto = AutoModelForImageTextToText if family.startswith("qwen3_vl") else AutoModelForCausalLM
    model, report = auto.from_pretrained(native, output_loading_info=True)
    assert not any(report.values()), report
    facts = open_model(source).facts
    assert packed_modules(model) == (len(facts.moe_layers), len(facts.layers[3].linears))
    found = logits(model)
    assert difference(found, logits(rounded_dense(source))) <= TOLERANCE
    assert difference(found, streamed(native, tmp_path / "hidden")) <= TOLERANCE
    assert difference(found, logits(moecompress.load(source))) > 1e-3  # rounding is felt at all
    assert model.generate(IDS[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 7)

    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(native), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = moecompress.load(tmp_path / "again")
    assert packed_modules(again) == packed_modules(model)
    assert difference(logits(again), found) <= TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "nemotron_h", "aria_text", "qwen3_vl_moe"])
def test_dequantized_is_the_familys_own_model(family: str, tmp_path: Path) -> None:
    source = families.save_tiny(family, tmp_path / "source", torch.float32)
    native = write_native(source, tmp_path / "native")
    wanted = logits(rounded_dense(source))
    packed = moecompress.load(native)
    for number, model in enumerate((moecompress.load(native, dequantize=True), packed.dequantize())):
        assert packed_modules(model) == (0, 0)
        assert {type(m) for m in model.modules()} == {type(m) for m in moecompress.load(source).modules()}
        assert difference(logits(model), wanted) <= TOLERANCE
        saved = tmp_path / f"dense{number}"
        model.save_pretrained(saved)
        assert "quantization_config" not in json.loads((saved / "config.json").read_text())
        before, after = tensors_of(source), tensors_of(saved)
        assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
        assert difference(logits(moecompress.load(saved)), wanted) <= TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_packed_and_dense_layers_side_by_side(family: str, tmp_path: Path) -> None:
    source = families.save_tiny(family, tmp_path / "source", torch.float32)
    native = write_native(source, tmp_path / "native", experts=(1,), linears=())
    model = moecompress.load(native)
    assert packed_modules(model) == (1, 0)
    assert difference(logits(model), logits(rounded_dense(source, experts=(1,), linears=()))) <= TOLERANCE
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(native), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert difference(streamed(tmp_path / "again", tmp_path / "hidden"), logits(model)) <= TOLERANCE


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "lfm2_moe", "ernie4_5_moe"])
def test_fewer_experts_than_the_config_says(family: str, tmp_path: Path) -> None:
    keep = (0, 2, 3, 6, 7)
    source = families.save_tiny(family, tmp_path / "source", torch.float32)
    native = write_native(source, tmp_path / "native", linears=(), keep=keep)
    reference = families.tiny_model(family, num_experts=len(keep), num_local_experts=len(keep))
    stock = rounded_dense(source, linears=()).state_dict()
    wanted = reference.state_dict()
    for name, value in wanted.items():
        before = stock[name]
        changed = [dim for dim, size in enumerate(value.shape) if before.shape[dim] != size]
        wanted[name] = before.index_select(changed[0], torch.tensor(keep)) if changed else before
    reference.load_state_dict(wanted)
    model = moecompress.load(native)
    assert difference(logits(model), logits(reference)) <= TOLERANCE
    model.save_pretrained(tmp_path / "again")
    assert difference(logits(moecompress.load(tmp_path / "again")), logits(reference)) <= TOLERANCE
    with pytest.raises(UnsupportedModel, match="5 experts in .* 8 in config.json"):
        moecompress.load(native, dequantize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto", None])
def test_the_dtype_leaves_records_as_they_are(dtype: Any, mixtral: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mixtral[1], dtype=dtype)
    stored = tensors_of(mixtral[1])
    records = [name for name, value in stored.items() if value.dtype == torch.uint8 and value.numel() > 1]
    assert records and all(torch.equal(model.state_dict()[name], stored[name]) for name in records)
    wanted = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # the source's own, and torch's default
    assert model.lm_head.weight.dtype == wanted
    modules: list[Any] = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert modules[0].expert(0).gate_up.scales.dtype == torch.bfloat16  # as stored, whatever the model's dtype
    assert torch.isfinite(logits(model)).all()
    model.to(torch.bfloat16)
    assert all(torch.equal(model.state_dict()[name], stored[name]) for name in records)


def test_device_maps(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = logits(moecompress.load(mixtral[1]))
    places = {f"model.layers.{n}": "disk" if n in (1, 3) else "cpu" for n in ALL}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for device_map in ("cpu", "auto", {"": "cpu"}, places):
        model = moecompress.load(mixtral[1], device_map=device_map, offload_folder=str(tmp_path / "off"))
        assert difference(logits(model), wanted) <= TOLERANCE


def test_a_base_model_without_head_loads_packed(mixtral: tuple[Path, Path]) -> None:
    from transformers import AutoModel

    base, full = AutoModel.from_pretrained(mixtral[1]), moecompress.load(mixtral[1])
    assert packed_modules(base) == packed_modules(full)
    with torch.no_grad():
        found, wanted = base(IDS, use_cache=False)[0], full.model(IDS, use_cache=False)[0]
    assert difference(found, wanted) <= TOLERANCE


def test_dense_checkpoints_load_too(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    model = moecompress.load(str(mixtral[0]), dequantize=True)
    assert packed_modules(model) == (0, 0) and model.dtype == torch.float32

    def foreign(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "gptq"}

    with pytest.raises(CheckpointError, match="dequantize=True"):
        moecompress.load(rewrite(mixtral[0], tmp_path / "other", foreign), dequantize=True)


EXPERTS = "model.layers.1.mlp.experts"


def _slot(expert: int, value: list[int]) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors[f"{EXPERTS}.slot_map"][expert] = torch.tensor(value, dtype=torch.int32)

    return change


def _tensor(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return change


def _block(*path: Any, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(_: dict[str, Tensor], config: dict[str, Any]) -> None:
        at = config["quantization_config"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def _rename(old: str, new: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"]["experts"][new] = config["quantization_config"]["experts"].pop(old)
        for name in [name for name in tensors if name.startswith(old + ".")]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def _narrow(_: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["intermediate_size"] = 16


BYTE = torch.zeros(1, dtype=torch.uint8)
WRONG: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = {
    "newer": (_block("format_version", value=99), "format_version 99.*upgrade moecompress"),
    "unknown key": (_block("mystery", value=1), "unknown key 'mystery'"),
    "layout": (_block("layouts", 0, "row_bytes", value=64), "not those of the format"),
    "count": (_block("experts", EXPERTS, "num_experts", value=9), r"slot_map: torch.int32 \[8, 2\].*\[9, 2\]"),
    "too few": (_block("experts", EXPERTS, "num_experts", value=7), "7 experts in 8 record layouts"),
    "record gone": (_tensor(f"{EXPERTS}.rec1", None), r"experts\.rec1: is missing"),
    "record extra": (_tensor(f"{EXPERTS}.rec77", BYTE), r"rec77: is not in config.json"),
    "record elsewhere": (_tensor("model.norm.rec0", BYTE), r"model\.norm: has records"),
    "record size": (_tensor(f"{EXPERTS}.rec0", torch.zeros(1, 64, dtype=torch.uint8)), r"rec0: torch.uint8 \[1, 64\]"),
    "record flat": (_tensor(f"{EXPERTS}.rec0", torch.zeros((), dtype=torch.uint8)), r"rec0: torch.uint8 \[\]"),
    "linear record": (
        _tensor("model.layers.3.self_attn.q_proj.rec0", torch.zeros(2, 64, dtype=torch.uint8)),
        r"q_proj\.rec0: torch.uint8 \[2, 64\]",
    ),
    "guard gone": (_tensor(f"{EXPERTS}.down_proj", None), r"experts\.down_proj: is missing"),
    "slot map gone": (_tensor(f"{EXPERTS}.slot_map", None), "slot_map: is missing"),
    "slot map type": (_tensor(f"{EXPERTS}.slot_map", torch.zeros(8, 2)), "slot_map: torch.float32"),
    "no such layout": (_slot(2, [40, 0]), r"slot_map: expert 2 is at \(40, 0\)"),
    "no such row": (_slot(2, [0, 40]), r"slot_map: expert 2 is at \(0, 40\)"),
    "negative": (_slot(2, [0, -1]), r"slot_map: expert 2 is at \(0, -1\)"),
    "twice": (_slot(2, [0, 0]), "slot_map: 8 experts use 7 of 8 records"),
    "no such module": (_rename(EXPERTS, "model.layers.9.mlp.experts"), "MixtralForCausalLM has no such module"),
    "no experts": (_rename(EXPERTS, "model.layers.1.mlp"), "tensors are missing"),
    "dense gone": (_tensor("model.layers.2.input_layernorm.weight", None), "1 tensors are missing.*input_layernorm"),
    "dense and packed": (
        _tensor("model.layers.1.block_sparse_moe.experts.0.w2.weight", torch.zeros(64, 32)),
        "stored packed and dense",
    ),
    "width": (_narrow, r"experts: gate_up records hold \[96, 64\].*\[32, 64\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused_at_load(what: str, mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    change, text = WRONG[what]
    broken = rewrite(mixtral[1], tmp_path / "broken", change)
    with pytest.raises(CheckpointError, match=text):
        AutoModelForCausalLM.from_pretrained(broken)


def test_an_unchanged_copy_loads(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    copy = rewrite(mixtral[1], tmp_path / "copy", lambda tensors, config: None)
    assert difference(logits(moecompress.load(copy)), logits(moecompress.load(mixtral[1]))) <= TOLERANCE


def in_new_process(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WITHOUT = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
        print("loaded")
    except Exception as error:
        print("refused")
assert "moecompress" not in sys.modules
"""


def test_without_the_import_the_load_fails(tmp_path: Path) -> None:
    paths = []
    for family in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "nemotron_h"):
        source = families.save_tiny(family, tmp_path / family)
        paths.append(write_native(source, tmp_path / f"{family}-experts", linears=()))
        paths.append(write_native(source, tmp_path / f"{family}-linears", experts=()))
        shutil.rmtree(source)
    assert in_new_process(WITHOUT, *paths).split() == ["refused"] * len(paths)


ORDERS = {
    "transformers first": "import transformers.quantizers.auto, moecompress",
    "moecompress first": "import moecompress, transformers",
    "the loader first": "import moecompress.load, moecompress, transformers",
}
WITH = """
import sys
{imports}
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert any(type(m).__name__.startswith("PackedExperts") for m in model.modules())
assert type(moecompress.load).__name__ == "function"
assert not any(type(finder).__module__ == "moecompress" for finder in sys.meta_path)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order: str, mixtral: tuple[Path, Path]) -> None:
    in_new_process(WITH.format(imports=ORDERS[order]), mixtral[1])


LIGHT = """
import sys, moecompress
assert not {"torch", "transformers", "numpy"} & sys.modules.keys(), "import moecompress is heavy"
import moecompress.plan
assert callable(moecompress.plan) and callable(moecompress.run) and moecompress.__version__
"""


def test_the_import_is_light_and_functions_stay_functions() -> None:
    in_new_process(LIGHT)
