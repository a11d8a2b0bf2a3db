"""`moecompress export`: equal values in every format, proved by the packages that read it, or reasons why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import command, difference, own_logits, random_ids, read_json, reload_here, streamed_logits, write_recipe
from families import save_tiny
from mixed import mixed_recipe
from safetensors import safe_open
from stock import run_stock
from torch import Tensor

from moecompress.checkpoint.gptq import gptq_entries
from moecompress.errors import OutputError, Stopped
from moecompress.export import export_dir
from moecompress.numerics.grids import dequantize, round_to_nearest
from moecompress.recipe import load_recipe
from moecompress.run import run
from moecompress.stream.model import open_model
from moecompress.types import PROJECTIONS, QuantizedTensor, Scheme

MIXED = ("mixtral", "deepseek_v3", "qwen2_moe", "phimoe", "olmoe", "deepseek_v2", "qwen3_moe")
NARROW, WIDE = (1, 2, 3, 4), (1, 2, 3, 4, 8)
IDS = random_ids(2, 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Native outputs with mixed bits per expert, their container and dense exports, and stock transformers on those."""
    root = tmp_path_factory.mktemp("export")
    native, container, dense = {}, {}, {}
    with pytest.MonkeyPatch.context() as patch:
        reload_here(patch)
        for family in MIXED:
            folder = root / family
            folder.mkdir()
            save_tiny(family, folder / "model")
            cycle = WIDE if family == "qwen3_moe" else NARROW
            native[family] = run(mixed_recipe(folder, folder / "model", cycle, output={"format": "native"}))
            container[family] = export_dir(native[family], "container", folder / "container")
            dense[family] = export_dir(native[family], "dense", folder / "dense")
    stock = run_stock([*container.values(), *dense.values()], IDS, root)
    return SimpleNamespace(root=root, native=native, container=container, dense=dense, stock=stock)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reload_here(monkeypatch)
    yield


def _native(folder: Path, family: str = "mixtral", *passes: Any) -> Path:
    folder.mkdir()
    save_tiny(family, folder / "model")
    steps = list(passes) or [{"quantize.rtn": {"bits": 4, "group_size": 16}}]
    return run(load_recipe(write_recipe(folder, folder / "model", steps, output={"format": "native"})))


@pytest.mark.parametrize("family", MIXED)
def test_container_holds_mixed_bits_exactly(made: Any, family: str, tmp_path: Path) -> None:
    """1-, 2-, 3-, 4- (and 8-) bit experts in one checkpoint that stock transformers loads."""
    model, found = open_model(made.native[family]), made.stock[made.container[family]]
    schemes = set()
    for layer in model.facts.moe_layers:
        for number, expert in enumerate(model.read_experts(layer.index)):
            for name in PROJECTIONS:
                weight = expert.projection(name)
                assert isinstance(weight, QuantizedTensor)
                schemes.add(weight.scheme.bits)
                stock = found[f"{layer.name}.{layer.site.experts}.{name}_proj"][number]  # type: ignore[union-attr]
                assert torch.equal(stock.float(), dequantize(weight, torch.bfloat16).float())
    assert schemes == set(WIDE if family == "qwen3_moe" else NARROW)
    group = read_json(made.container[family] / "config.json")["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["num_bits"] == (8 if family == "qwen3_moe" else 4)
    assert torch.equal(found["logits"], made.stock[made.dense[family]]["logits"])
    assert difference(streamed_logits(open_model(made.container[family]), IDS, tmp_path), found["logits"]) < 1e-5


def test_an_export_is_a_whole_output(made: Any) -> None:
    source, out = made.native["mixtral"], made.container["mixtral"]
    for path in (out, made.dense["mixtral"]):
        assert command("verify", path).code == 0
    manifest = read_json(out / "moecompress" / "manifest.json")
    assert manifest["tensors"].keys() == read_json(source / "moecompress" / "manifest.json")["tensors"].keys()
    assert manifest["export"] == {"format": "container", "lost": []}
    row = manifest["tensors"]["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    assert row["action"] == "quantize" and row["bits"] == 4 and len(row["outputs"]) == 3
    report = read_json(out / "moecompress" / "report.json")
    stored = sum(int(facts["nbytes"]) for facts in manifest["outputs"].values())
    assert report["format"] == "container" and report["size"]["output_bytes"] == stored
    assert report["size"]["expert_bits_per_weight"] == 4 + 16 / 16  # codes, and a 16-bit scale for 16 weights
    assert "import moecompress" not in (out / "README.md").read_text()
    assert "exported to container from a native output" in (out / "README.md").read_text()
    for name in ("generation_config.json", "moecompress/recipe.yaml"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.usefixtures("quick")
def test_what_run_writes_is_what_export_writes(tmp_path: Path) -> None:
    """native -> portable is portable written at once, byte for byte: with two schemes, too."""
    steps: list[Any] = [
        {"quantize.rtn": {"bits": 3, "group_size": 16}},
        {"quantize.rtn": {"bits": 8, "group_size": -1, "targets": ["attention"]}},
    ]
    native = _native(tmp_path / "a", "mixtral", *steps)
    exported = export_dir(native, "portable", tmp_path / "exported")
    (tmp_path / "b").mkdir()
    recipe = write_recipe(tmp_path / "b", tmp_path / "a" / "model", steps, output={"format": "portable"})
    written = run(load_recipe(recipe))
    assert _tensors(exported) == _tensors(written)
    blocks = [read_json(path / "config.json")["quantization_config"] for path in (exported, written)]
    assert set(blocks[0].pop("ignore")) == set(blocks[1].pop("ignore")) and blocks[0] == blocks[1]
    again = export_dir(written, "portable", tmp_path / "again")
    assert _tensors(again) == _tensors(written)


def _tensors(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                value = opened.get_tensor(name)
                found[name] = hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "deepseek_v3"])
def test_dense_export_of_any_layout(family: str, tmp_path: Path) -> None:
    """Stacked experts, biases, and other quantized matrices: dense is what `format: dense` would have written."""
    steps: list[Any] = [{"quantize.rtn": {"bits": 4, "group_size": 16, "symmetric": family != "gpt_oss"}}]
    steps.append({"quantize.rtn": {"bits": 8, "group_size": -1, "targets": ["attention"]}})
    native = _native(tmp_path / "a", family, *steps)
    (tmp_path / "b").mkdir()
    recipe = write_recipe(tmp_path / "b", tmp_path / "a" / "model", steps, output={"format": "dense"})
    assert _tensors(export_dir(native, "dense", tmp_path / "dense")) == _tensors(run(load_recipe(recipe)))
    assert own_logits(tmp_path / "dense", IDS).isfinite().all()


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 32), (4, -1), (8, 32), (3, -1)])
def test_gptq_words_by_the_published_rule(bits: int, size: int) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits))
    coded = round_to_nearest(weight, Scheme(bits, size), grid="mse", scale_dtype=torch.float16)
    stored = {entry.name.removeprefix("m."): _read(entry) for entry in gptq_entries("m", coded)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "qweight": (torch.int32, (64 * bits // 32, 32)),
        "qzeros": (torch.int32, (coded.scales.shape[1], 32 * bits // 32)),
        "scales": (torch.float16, (coded.scales.shape[1], 32)),
        "g_idx": (torch.int32, (64,)),
    }
    codes, zeros = _gptq_rows(stored["qweight"], bits), _gptq_rows(stored["qzeros"].T, bits).T
    group = stored["g_idx"].long()
    values = stored["scales"].float()[group] * (codes - zeros[group] - 1)
    assert torch.equal(values.T, dequantize(coded))


def _read(entry: Any) -> Tensor:
    data = b"".join(bytes(memoryview(piece).cast("B")) for piece in entry.data())
    return torch.frombuffer(bytearray(data), dtype=entry.dtype).reshape(entry.shape)


def _gptq_rows(words: Tensor, bits: int) -> Tensor:
    """int32 [n * bits / 32, columns] -> codes [n, columns], field by field as AutoGPTQ unpacks them."""
    rows = []
    w = [[int(value) & 0xFFFFFFFF for value in row] for row in words]
    if bits != 3:
        for row in w:
            rows += [[value >> (bits * j) & ((1 << bits) - 1) for value in row] for j in range(32 // bits)]
        return torch.tensor(rows)
    for a, b, c in zip(w[::3], w[1::3], w[2::3], strict=True):
        rows += [[value >> (3 * j) & 7 for value in a] for j in range(10)]
        rows.append([x >> 30 | (y & 1) << 2 for x, y in zip(a, b, strict=True)])
        rows += [[value >> (3 * j + 1) & 7 for value in b] for j in range(10)]
        rows.append([x >> 31 | (y & 3) << 1 for x, y in zip(b, c, strict=True)])
        rows += [[value >> (3 * j + 2) & 7 for value in c] for j in range(10)]
    return torch.tensor(rows)


def test_gptq_export_has_a_rule_for_every_other_scheme(made: Any, tmp_path: Path) -> None:
    out = export_dir(made.native["qwen3_moe"], "gptq", tmp_path / "out")
    block = read_json(out / "config.json")["quantization_config"]
    assert block == read_json(out / "quantize_config.json") and block["sym"] and not block["desc_act"]
    names = _tensors(out)
    first = "model.layers.0.mlp.experts.3.down_proj"
    assert f"{first}.qweight" in names and f"{first}.weight" not in names
    changed = {rule: value for rule, value in block["dynamic"].items() if rule.startswith("+:")}
    plain = ("lm_head", "model.layers.2.self_attn.q_proj", "model.layers.1.mlp.gate")
    assert {"-:^" + name.replace(".", r"\.") + "$" for name in plain} <= block["dynamic"].keys()
    assert {value["bits"] for value in changed.values()} | {block["bits"]} == {2, 3, 4, 8}  # 1 bit as 2-bit codes
    rows = read_json(out / "moecompress" / "report.json")["loadable"]
    assert {row["status"] for row in rows.values()} == {"no"}
    card = (out / "README.md").read_text()
    assert "GPTQModel.load" in card and "AutoModelForCausalLM" not in card


def test_refusals_say_what_would_be_lost_and_leave_nothing(made: Any, tmp_path: Path) -> None:
    result = command("export", made.native["mixtral"], "--format", "portable", "--out", tmp_path / "x")
    assert result.code == 2 and "mixed bits (1, 2, 3, 4) (--format container can hold them)" in result.err
    assert "--allow-lossy" in result.err
    for arguments, reason in (
        ((made.dense["mixtral"], "--format", "gptq", "--out", tmp_path / "x"), "holds no quantized weights"),
        ((made.native["mixtral"], "--format", "awq", "--out", tmp_path / "x"), "portable, container, dense, gptq"),
        ((made.native["mixtral"], "--format", "dense", "--out", tmp_path), "exists"),
        ((made.native["mixtral"], "--format", "dense", "--out", made.native["mixtral"] / "x"), "lies inside"),
    ):
        result = command("export", *arguments)
        assert result.code == 2 and reason in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_wide_codes_zero_points_and_stacks_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], Any, str]] = [
        ("mixtral", {"bits": 4, "group_size": 16, "symmetric": False}, "container", "zero points"),
        ("mixtral", {"bits": 4, "group_size": 16, "symmetric": False}, "gptq", "zero points"),
        ("mixtral", {"bits": 1, "group_size": 16}, "portable", "--format container can"),
        ("mixtral", {"bits": 4, "group_size": 16}, "gptq", r"multiples of 32, not of \[48\]"),
        ("gpt_oss", {"bits": 4, "group_size": 16}, "portable", "only names single experts"),
    ]
    for number, (family, parameters, form, reason) in enumerate(cases):
        native = _native(tmp_path / str(number), family, {"quantize.rtn": parameters})
        with pytest.raises(OutputError, match=reason):
            export_dir(native, form, tmp_path / "out")
    with pytest.raises(OutputError, match="only names single experts"):
        export_dir(native, "gptq", tmp_path / "out", allow_lossy=True)


@pytest.mark.usefixtures("quick")
def test_allow_lossy_rounds_only_what_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_tiny("mixtral", tmp_path / "a" / "model")
    native = run(mixed_recipe(tmp_path / "a", tmp_path / "a" / "model", (2, 4, -3), output={"format": "native"}))
    with pytest.raises(OutputError, match="zero points"):
        export_dir(native, "container", tmp_path / "out")
    out = export_dir(native, "container", tmp_path / "out", allow_lossy=True)
    before, after = open_model(native).read_experts(1), open_model(out).read_experts(1)
    for old, new in zip(before, after, strict=True):
        for name in PROJECTIONS:
            a, b = old.projection(name), new.projection(name)
            assert isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor)
            far = float((dequantize(a) - dequantize(b)).norm() / dequantize(a).norm())
            assert (far == 0) == a.scheme.symmetric and far < 0.2
    manifest = read_json(out / "moecompress" / "manifest.json")
    assert manifest["export"]["lost"] == ["zero points"]
    assert "lost: zero points" in (out / "README.md").read_text()
    assert not (out / "moecompress" / "eval.json").exists()


def test_a_full_disk_leaves_nothing(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise Stopped("shard: no space left on the disk. Next: free some space and run again with --resume")

    monkeypatch.setattr("moecompress.export.run.write_shard", full)
    with pytest.raises(OutputError, match="no space left on the disk. Next: free some space and export again"):
        export_dir(made.native["olmoe"], "container", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damage_is_found_before_anything_is_written(made: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in made.native["olmoe"].iterdir():
        if path.is_file():
            (broken / path.name).symlink_to(path)
    result = command("export", broken, "--format", "container", "--out", tmp_path / "out")
    assert result.code == 2 and "manifest.json: no such file" in result.err
    (broken / "moecompress").mkdir()
    (broken / "moecompress" / "manifest.json").write_text(json.dumps({"tensors": 3}))
    result = command("export", broken, "--format", "container", "--out", tmp_path / "out")
    assert result.code == 2 and "not a manifest" in result.err and not (tmp_path / "out").exists()
