"""The portable format: proved with the real compressed-tensors package in stock transformers, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import command, difference, random_ids, read_json, reload_here, streamed_logits, write_recipe
from families import save_tiny
from mixed import mixed_recipe
from stock import run_stock

from moecompress.checkpoint.portable import Group, PortableConfig, packed_entries, portable_config
from moecompress.errors import CheckpointError, OutputError, UnsupportedModel
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.numerics.widen import fits_codes, widen_codes
from moecompress.plan import make_plan
from moecompress.portable import engines
from moecompress.recipe import load_recipe
from moecompress.run import run
from moecompress.stream.model import open_model
from moecompress.types import MoESite, QuantizedTensor, Scheme

CASES = (("mixtral", 4), ("qwen3_moe", 3), ("olmoe", 2), ("qwen2_moe", 4), ("deepseek_v2", 2), ("deepseek_v3", 3))
CASES = (*CASES, ("phimoe", 4), ("qwen3_moe", 8))
OTHERS = {
    "deepseek_v3": ["attention", "shared_experts", "dense_mlp"],
    "mixtral": ["attention"],
    "qwen2_moe": ["attention", "shared_experts"],
}
IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Portable outputs of every case, with and without quantized attention, and what stock transformers has in them."""
    root = tmp_path_factory.mktemp("portable")
    outs: dict[Any, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        reload_here(patch)
        for family, bits in CASES:
            outs[family, bits] = _output(root, family, [{"quantize.rtn": {"bits": bits, "group_size": 16}}])
        for family, targets in OTHERS.items():
            eight = {"quantize.rtn": {"bits": 8, "group_size": -1, "targets": targets}}
            outs[family, "both"] = _output(root, family, [{"quantize.rtn": {"bits": 4, "group_size": 16}}, eight])
    both = [outs[family, "both"] for family in OTHERS]
    narrow = run_stock(both, IDS, root, "bfloat16")
    return SimpleNamespace(outs=outs, stock=run_stock(list(outs.values()), IDS, root), narrow=narrow)


def _output(root: Path, family: str, passes: list[Any]) -> Path:
    folder = root / f"{family}-{len(list(root.iterdir()))}"
    folder.mkdir()
    save_tiny(family, folder / "model")
    return run(load_recipe(write_recipe(folder, folder / "model", passes)))


@pytest.mark.parametrize("case", [*CASES, *((family, "both") for family in OTHERS)], ids=str)
def test_stock_transformers_has_our_values(made: Any, case: Any, tmp_path: Path) -> None:
    out = made.outs[case]
    config = read_json(out / "config.json")["quantization_config"]
    assert config["quant_method"] == "compressed-tensors", "auto has to choose portable for one scheme"
    model, found = open_model(out), made.stock[out]
    negative = 0
    for layer in model.facts.moe_layers:
        assert layer.site is not None
        for number, expert in enumerate(model.read_experts(layer.index)):
            for name, weight in (("gate_up_proj", expert.gate_up), ("down_proj", expert.down)):
                assert isinstance(weight, QuantizedTensor)
                negative += int((weight.scales < 0).sum())
                stock = found[f"{layer.name}.{layer.site.experts}.{name}"][number]
                assert torch.equal(stock.float(), dequantize(weight, torch.bfloat16).float())
    assert negative or case[1] == 8, "scales found by least squares are negative at times, and have to be loaded so"
    assert difference(streamed_logits(model, IDS, tmp_path), found["logits"]) < 1e-5


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_transformers_has_our_values_of_other_matrices(made: Any, family: str, dtype: torch.dtype) -> None:
    """Linears are expanded in the dtype that the model is loaded in, experts always in that of their scales."""
    out = made.outs[family, "both"]
    found = (made.stock if dtype == torch.float32 else made.narrow)[out]
    model, seen = open_model(out), set()
    for layer in model.facts.layers:
        for name, weight in model.read_layer(layer.index).tensors.items():
            if isinstance(weight, QuantizedTensor):
                stock = found[f"{layer.name}.{name}"]
                assert weight.scales.dtype == torch.bfloat16 and stock.dtype == dtype
                assert torch.equal(stock, dequantize(weight, dtype))
                seen.add(layer.roles[name])
        for number, expert in enumerate(model.read_experts(layer.index)):
            stock = found[f"{layer.name}.{layer.site.experts}.down_proj"][number]  # type: ignore[union-attr]
            assert torch.equal(stock, dequantize(expert.down, torch.bfloat16))  # type: ignore[arg-type]
    assert {str(role) for role in seen} == set(OTHERS[family])


def test_values_are_those_of_the_quantizer(made: Any, tmp_path: Path) -> None:
    """From the source and `round_to_nearest` alone, not through our reader."""
    out = made.outs["mixtral", 4]
    source = open_model(out.parent / "model")
    for layer in source.facts.moe_layers:
        for number, expert in enumerate(source.read_experts(layer.index)):
            weight = round_to_nearest(expert.down.float(), Scheme(4, 16), grid="mse")  # type: ignore[union-attr]
            stock = made.stock[out][f"{layer.name}.{layer.site.experts}.down_proj"][number]  # type: ignore[union-attr]
            assert torch.equal(stock.float(), dequantize(weight, torch.bfloat16).float())


def test_names_are_those_of_the_source(made: Any) -> None:
    index = read_json(made.outs["mixtral", 4] / "model.safetensors.index.json")["weight_map"]
    first = "model.layers.0.block_sparse_moe.experts.0"
    expected = {f"{first}.{leaf}.weight_{part}" for leaf in ("w1", "w2", "w3") for part in ("packed", "scale", "shape")}
    assert {name for name in index if name.startswith(first + ".")} == expected


def test_ignore_names_everything_else_twice_where_names_differ(made: Any) -> None:
    block = read_json(made.outs["mixtral", 4] / "config.json")["quantization_config"]
    ignore = set(block["ignore"])
    assert {"model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.gate", "lm_head"} <= ignore
    assert {f"model.layers.3.self_attn.{leaf}_proj" for leaf in "qkvo"} <= ignore
    both = read_json(made.outs["mixtral", "both"] / "config.json")["quantization_config"]
    assert not [name for name in both["ignore"] if "self_attn" in name]
    assert [group["weights"]["num_bits"] for group in both["config_groups"].values()] == [4, 8]


def test_report_says_who_loads_it(made: Any) -> None:
    report = read_json(made.outs["qwen3_moe", 3] / "moecompress" / "report.json")
    assert report["format"] == "portable"
    rows = report["loadable"]
    assert [rows[name]["status"] for name in ("transformers", "vllm", "sglang")] == ["tested", "by_rule", "no"]
    assert command("verify", made.outs["qwen3_moe", 3]).code == 0
    assert "compressed-tensors" in command("inspect", made.outs["qwen3_moe", 3]).out


def test_a_portable_output_is_no_source(made: Any, tmp_path: Path) -> None:
    result = command("plan", write_recipe(tmp_path, made.outs["mixtral", 4]))
    assert result.code == 2 and "already compressed" in result.err


REFUSALS: tuple[tuple[str, list[Any], str], ...] = (
    ("mixtral", [{"quantize.rtn": {"bits": 4, "group_size": 16, "symmetric": False}}], "zero points"),
    ("mixtral", [{"quantize.rtn": {"bits": 1, "group_size": 16}}], "export --format container"),
    ("gpt_oss", [{"quantize.rtn": {"bits": 4, "group_size": 16}}], "only names single experts"),
    ("kimi_linear", [{"quantize.rtn": {"bits": 4, "group_size": 16}}], "joins several tensors"),
    ("mixtral", [{"quantize.rtn": {"bits": 4, "group_size": 24}}], "group_size 24 does not divide the 64"),
    ("mixtral", [{"quantize.rtn": {"bits": 4, "group_size": 16, "targets": ["attention"]}}], "all of them must be"),
)


@pytest.mark.parametrize(("family", "passes", "reason"), REFUSALS, ids=lambda value: str(value)[:20])
def test_plan_refuses_with_reason_and_alternative(family: str, passes: Any, reason: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    recipe = write_recipe(tmp_path, tmp_path / "model", passes, output={"format": "portable"})
    result = command("plan", recipe)
    assert result.code == 2 and reason in result.err
    if "group_size" not in reason:
        assert "output.format portable" in result.err
        auto = make_plan(load_recipe(recipe, ["output.format=auto"]))
        assert auto.output == "native" and not auto.problems


def test_mixed_bits_that_a_pass_decides_are_refused_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload_here(monkeypatch)
    save_tiny("mixtral", tmp_path / "model")
    with pytest.raises(OutputError, match="format portable.*native"):
        run(mixed_recipe(tmp_path, tmp_path / "model", output={"format": "portable"}))
    assert not (tmp_path / "out").exists()


def test_reading_refuses_what_contradicts_itself(made: Any, tmp_path: Path) -> None:
    source = made.outs["olmoe", 2]
    for change, error in (
        ({"format": "int-quantized"}, UnsupportedModel),
        ({"config_groups": {}}, UnsupportedModel),
        ({"config_groups": _group(symmetric=False)}, UnsupportedModel),
        ({"config_groups": _group(num_bits=4)}, CheckpointError),
        ({"config_groups": _group(group_size=8)}, CheckpointError),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in source.glob("*.safetensors*"):
            (folder / path.name).symlink_to(path)
        config = read_json(source / "config.json")
        config["quantization_config"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(error):
            model = open_model(folder)
            model.read_experts(0)


def _group(**changed: Any) -> dict[str, Any]:
    weights = {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16} | changed
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def test_config_block_is_read_back() -> None:
    config = portable_config(Scheme(4, 32), Scheme(8), ["lm_head"])
    assert PortableConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.scheme_of("model.layers.0.mlp.experts.11.up_proj") == Scheme(4, 32)
    assert config.scheme_of("model.layers.0.mlp.shared_experts.up_proj") == Scheme(8)
    assert portable_config(Scheme(4, 32), Scheme(4, 32), []).groups == (Group(Scheme(4, 32), ("Linear",)),)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("wide", [2, 3, 4, 8])
def test_wider_codes_have_equal_values(bits: int, wide: int) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(bits))
    narrow = round_to_nearest(weight, Scheme(bits, 16, binary=bits == 1), grid="mse")
    if not fits_codes(narrow, wide):
        assert wide < bits
        with pytest.raises(ValueError, match="outside"):
            widen_codes(narrow, wide)
        return
    widened = widen_codes(narrow, wide)
    assert widened.scheme == Scheme(wide, 16) and int(widened.codes.max()) < 1 << wide
    assert torch.equal(dequantize(widened), dequantize(narrow))


def test_codes_without_a_place_are_refused() -> None:
    weight = torch.randn(8, 32)
    for scheme in (Scheme(4, 16, symmetric=False, zero="int"), Scheme(1, 16, binary=True)):
        coded = round_to_nearest(weight, scheme)
        with pytest.raises(ValueError, match="symmetric codes"):
            packed_entries("x", coded)
    assert not fits_codes(round_to_nearest(weight, Scheme(2, 16, symmetric=False, zero="int")), 8)


def test_rules_of_the_engines() -> None:
    """What the engines' own code asks for: see `engines`."""

    def status(hidden: int, width: int, bits: int, size: int, linears: Scheme | None = None) -> tuple[str, str]:
        found = engines(MoESite("mlp.experts", "mlp.gate", 8, 2, hidden, width), Scheme(bits, size), linears)
        return found["vllm"]["status"], found["sglang"]["status"]

    by_rule, no = "by_rule", "no"
    assert status(128, 192, 4, 32) == status(128, 64, 8, -1) == status(256, 128, 4, 128) == (by_rule, by_rule)
    assert status(128, 192, 3, 32) == status(128, 192, 2, 32) == (by_rule, no)  # Humming has them
    assert status(128, 192, 4, 16) == (by_rule, no)  # no group of Marlin's: Triton in vLLM
    assert status(64, 192, 4, 32) == status(128, 96, 4, 32) == (by_rule, no)  # shapes that Marlin does not take
    assert status(128, 192, 4, 128) == (no, no)  # 128 does not divide the width 192
    assert status(64, 64, 4, -1) == (no, no)  # scales per channel run on Marlin alone
    assert (
        status(128, 64, 4, 32, Scheme(8)) == (by_rule, no) and status(128, 64, 4, 32, Scheme(4, 32)) == (by_rule,) * 2
    )
