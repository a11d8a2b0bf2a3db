"""What the tests of the engine share: token runs, streamed logits, the models' own logits, runs of the command line."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from moecompress.arch.quirks import UNSUPPORTED
from moecompress.calib.tokens import make_token_set
from moecompress.stream.collect import Collector
from moecompress.stream.model import StreamModel
from moecompress.stream.streams import TokenRun, final_logits, run_layer, start_run
from moecompress.types import LayerWeights, Stream

STREAMED = tuple(name for name in families.FAMILIES if name not in UNSUPPORTED)


def random_ids(sequences: int, length: int, seed: int = 0, vocabulary: int = 100) -> Tensor:
    """int64 [sequences, length] of ordinary tokens (no special ids, no picture ids)."""
    return torch.randint(3, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(seed))


def token_run(
    model: StreamModel,
    ids: Tensor,
    folder: Path,
    *,
    batch_tokens: int = 64,
    heldout: float = 0.0,
    streams: Sequence[Stream] = ("original",),
) -> TokenRun:
    """ids [N, T] just before layer 0."""
    tokens = make_token_set("tokens", ids, {"source": "random"}, heldout=heldout)
    return start_run(model, tokens, folder, batch_tokens=batch_tokens, streams=streams)


def through_layers(
    model: StreamModel, run: TokenRun, stop: int | None = None, collectors: dict[int, Collector] | None = None
) -> None:
    """Send the original stream through the layers before `stop` (all by default)."""
    for index in range(len(model.layers) if stop is None else stop):
        run_layer(model, model.read_layer(index), run, "original", collector=(collectors or {}).get(index))


def streamed_logits(model: StreamModel, ids: Tensor, folder: Path, *, batch_tokens: int = 64) -> Tensor:
    """Logits [N, T, V] of the checkpoint, one layer in memory at a time."""
    run = token_run(model, ids, folder, batch_tokens=batch_tokens)
    through_layers(model, run)
    return torch.cat([logits for _, logits in final_logits(model, run, "original")])


def own_model(path: Path) -> Any:
    """The checkpoint as transformers loads it, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    pictures = AutoConfig.from_pretrained(path).model_type in families._PICTURES
    auto = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def own_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits [N, T, V] of transformers' own forward, one sequence at a time."""
    model = own_model(path)
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in ids])


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert found.shape == wanted.shape and bool(wanted.abs().max() > 0)
    return float((found - wanted).abs().max() / wanted.abs().max())


def same_layer(first: LayerWeights, second: LayerWeights) -> bool:
    """Whether two layers of dense tensors are equal bit for bit."""
    experts = [torch.equal(x, y) for a, b in zip(first.experts, second.experts, strict=True) for x, y in _parts(a, b)]
    tensors = [torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors]  # type: ignore[arg-type]
    return all(experts) and all(tensors) and first.tensors.keys() == second.tensors.keys()


def _parts(first: Any, second: Any) -> Iterable[tuple[Tensor, Tensor]]:
    for name, value in vars(first).items():
        other = getattr(second, name)
        assert (value is None) == (other is None), name
        if value is not None:
            yield value, other


def _to_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """FP8 codes and the scale of every block of `size` x `size`, in the layout of DeepSeek-V3."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // size), -(-columns // size))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def _from_blocks(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    big = scales.repeat_interleave(size, 0)[: codes.shape[0]].repeat_interleave(size, 1)[:, : codes.shape[1]]
    return (codes.float() * big).to(torch.bfloat16)


def make_fp8(path: Path, dense: Path, size: int) -> None:
    """Turn the checkpoint at `path` into an FP8 one; `dense` gets the same values in bfloat16."""
    tensors = load_file(path / "model.safetensors")
    plain = dict(tensors)
    for name, weight in tensors.copy().items():
        if weight.ndim == 2 and any(part in name for part in ("mlp.", "self_attn.")) and ".gate." not in name:
            codes, scales = _to_blocks(weight.float(), size)
            tensors[name], tensors[f"{name}_scale_inv"] = codes, scales
            plain[name] = _from_blocks(codes, scales, size)
    assert any(name.endswith("experts.3.up_proj.weight_scale_inv") for name in tensors)
    dense.mkdir()
    save_file(plain, dense / "model.safetensors", {"format": "pt"})
    (dense / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [size, size]}
    (path / "config.json").write_text(json.dumps(config))


def write_recipe(folder: Path, model: Path, passes: Sequence[Any] | None = None, **sections: Any) -> Path:
    """A recipe file in `folder` for `model`; its output is `folder/out`."""
    data = {"model": str(model), "passes": list(passes or [{"quantize.rtn": {"bits": 4, "group_size": 32}}])}
    data["output"] = {"dir": str(folder / "out"), **sections.pop("output", {})}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**data, **sections}, sort_keys=False))
    return path


def token_calibration(folder: Path, ids: Tensor) -> dict[str, Any]:
    """A recipe's `calibration` of exactly these ids [N, T], kept in `folder`."""
    path = folder / "ids.safetensors"
    save_file({"ids": ids}, path)
    return {"source": "tokens", "files": [str(path)], "samples": ids.shape[0], "length": ids.shape[1]}


def command(*arguments: object) -> SimpleNamespace:
    """`moecompress ARGUMENTS` in this process: code, out, err."""
    from moecompress.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def command_line(*arguments: object) -> list[str]:
    """The same command for a process of its own. `-P`: the working directory is not searched for modules."""
    return [sys.executable, "-P", "-m", "moecompress", *map(str, arguments)]


def reload_here(patch: pytest.MonkeyPatch) -> None:
    """Let runs be quick: the reload check works in this process (a fresh one spends seconds on imports)."""
    from moecompress import reload

    def here(arguments: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        out = io.StringIO()
        assert list(arguments[1:4]) == ["-P", "-m", "moecompress.reload"]
        try:
            with contextlib.redirect_stdout(out):
                reload.main(arguments[4:])
        except Exception as error:
            return subprocess.CompletedProcess(arguments, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(arguments, 0, out.getvalue(), "")

    patch.setattr("moecompress.finish.subprocess.run", here)
    patch.setattr("os.fsync", lambda _: None)  # what survives a power cut is not asked here


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def calibrated_recipe(folder: Path, source: Path, *passes: Any, **sections: Any) -> Path:
    """A recipe in `folder` (made here), calibrated on 8 x 24 tokens of `ids.safetensors` beside the source."""
    folder.mkdir(exist_ok=True)
    calibration = {"source": "tokens", "files": [str(source.parent / "ids.safetensors")], "samples": 8, "length": 24}
    return write_recipe(folder, source, passes, calibration=calibration, **sections)


def finished_run(folder: Path, source: Path, *passes: Any, **sections: Any) -> Path:
    """The output directory of such a recipe."""
    done = command("run", calibrated_recipe(folder, source, *passes, **sections))
    assert done.code == 0, done.err
    return folder / "out"
