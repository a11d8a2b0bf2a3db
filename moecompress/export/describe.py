"""The files beside the shards of an export: config, index, side files, manifest, report and card."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecompress.checkpoint.writer import ShardRecord, atomic_write, write_index
from moecompress.export.convert import Converted, Target
from moecompress.export.source import Output
from moecompress.numerics.grids import stored_bits
from moecompress.portable import config_block, engines, ignored_modules
from moecompress.types import MoESite, Scheme

FOLDER = "moecompress"
_REMADE = ("README.md", "config.json", "quantize_config.json")
_WEIGHTS = (".safetensors", ".index.json")
_KEPT = ("recipe.yaml", "eval.json", "eval_windows.jsonl")


@dataclass(frozen=True)
class Export:
    """A conversion whose shards are written into `staging`. made: by layer, None for the rest. losses: in words."""

    output: Output
    target: Target
    staging: Path
    made: Mapping[int | None, Converted]
    records: Sequence[ShardRecord]
    losses: Sequence[str]

    def schemes(self) -> tuple[dict[str, Scheme], dict[str, Scheme]]:
        """Checkpoint module -> scheme: experts, other matrices."""
        found = {module: scheme for part in self.made.values() for module, scheme in part.schemes.items()}
        others = set(self.output.linears.values())
        return {m: s for m, s in found.items() if m not in others}, {m: s for m, s in found.items() if m in others}


def describe(export: Export) -> None:
    """Write everything but the shards. The measurements of the source directory are kept when nothing was lost."""
    output, staging, losses = export.output, export.staging, export.losses
    write_index(staging, export.records)
    _config(export)
    for path in sorted(output.root.iterdir()):
        if path.is_file() and path.name not in _REMADE and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, staging / path.name)
        elif path.is_dir() and path.name == "chat_templates":
            shutil.copytree(path, staging / path.name)
    folder = staging / FOLDER
    folder.mkdir()
    for name in _KEPT if not losses else _KEPT[:1]:
        if (output.root / FOLDER / name).is_file():
            shutil.copyfile(output.root / FOLDER / name, folder / name)
    _manifest(export)
    _report(export)


def _config(export: Export) -> None:
    output, target, staging = export.output, export.target, export.staging
    config = {key: value for key, value in output.model.raw_config.items() if key != "quantization_config"}
    experts, linears = export.schemes()
    if target.format == "gptq":
        config["quantization_config"] = gptq_block(output, experts, linears)
        atomic_write(staging / "quantize_config.json", _json(config["quantization_config"]))
    elif target.format != "dense":
        block = config_block(output.layout, next(iter(experts.values())), target.linears, linears)
        config["quantization_config"] = block.to_json()
    atomic_write(staging / "config.json", _json(config))


def gptq_block(output: Output, experts: Mapping[str, Scheme], linears: Mapping[str, Scheme]) -> dict[str, Any]:
    """GPTQModel's configuration: the commonest scheme, and a rule for every module that has another or none."""
    schemes = {**experts, **linears}
    common = Counter(schemes.values()).most_common(1)[0][0]
    rules: dict[str, dict[str, int]] = {}
    for module in ignored_modules(output.layout, linears):
        pattern = module[3:] if module.startswith("re:") else re.escape(module)
        rules[f"-:^{pattern}$"] = {}
    for module, scheme in schemes.items():
        if scheme != common:
            rules[f"+:^{re.escape(module)}$"] = {"bits": scheme.bits, "group_size": scheme.group_size}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": common.bits,
        "group_size": common.group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": rules,
        "meta": {"quantizer": ["moecompress"]},
    }


def _manifest(export: Export) -> None:
    """manifest.json: what became of every tensor of the original source, where the directory still says so."""
    rows = {key: row for part in export.made.values() for key, row in part.rows.items()}
    for key, row in export.output.rows.items():
        if key not in rows:
            rows[key] = {**row, "outputs": []}
        elif rows[key]["action"] == "copy":
            rows[key]["action"] = row["action"]
    outputs = {
        name: {"file": record.file, **facts} for record in export.records for name, facts in record.tensors.items()
    }
    data = {
        "schema": 1,
        "export": {"format": export.target.format, "lost": list(export.losses)},
        "tensors": dict(sorted(rows.items())),
        "outputs": dict(sorted(outputs.items())),
    }
    atomic_write(export.staging / FOLDER / "manifest.json", json.dumps(data, indent=1) + "\n")


def _report(export: Export) -> None:
    """report.* and the card, when the source directory has a report: its numbers, this format and size."""
    from moecompress.report import Report, model_card, read_evaluation, write_report, write_report_json

    output, target, staging = export.output, export.target, export.staging
    path = output.root / FOLDER / "report.json"
    if not path.is_file():
        return
    data = json.loads(path.read_text("utf-8"))
    size, written = (
        data["size"],
        sum(int(row["nbytes"]) for record in export.records for row in record.tensors.values()),
    )
    if size.get("total_bits_per_weight") and size.get("output_bytes"):
        size["total_bits_per_weight"] *= written / size["output_bytes"]
    size["output_bytes"] = written
    size["components"] = {}
    size["expert_bits_per_weight"] = _expert_bits(export)
    text = f"exported to {target.format} from a {data.get('format')} output" + (
        f"; lost: {'; '.join(export.losses)}" if export.losses else ", every value kept"
    )
    if target.format == "dense":
        text = text.replace("every value kept", "every value rounded once to the checkpoint's dtype")
    data["format"] = target.format
    data["warnings"] = [*data.get("warnings", ()), text]
    data["loadable"] = loadable(export)
    report = Report.model_validate(data)
    write_report_json(staging, report)
    write_report(staging)
    atomic_write(staging / "README.md", model_card(report, read_evaluation(staging), _licence(output.root)))


def _expert_bits(export: Export) -> float:
    """Stored bits (codes and scales) per weight of the routed experts."""
    target = export.target
    if target.format == "dense":
        return 8.0 * target.dtype.itemsize
    schemes, _ = export.schemes()
    shapes = {module: shape for part in export.made.values() for module, shape in part.shapes.items()}
    bits = sum(stored_bits(shapes[module], scheme, target.dtype) for module, scheme in schemes.items())
    return bits / sum(shapes[module][0] * shapes[module][1] for module in schemes)


def loadable(export: Export) -> dict[str, Any]:
    """Who loads the export, by the rules of their code: nothing is run here."""
    target, (experts, _) = export.target, export.schemes()
    site = export.output.model.facts.moe_layers[0].site
    assert site is not None
    if target.format == "dense":
        row = {"status": "by_rule", "reason": "a plain Hugging Face checkpoint in the source's layout and dtype"}
        return {"transformers": row, "vllm": row, "sglang": row}
    if target.format == "gptq":
        return _gptq_loadable(site, set(experts.values()))
    row = {
        "status": "by_rule",
        "reason": "experts read back equal to the source's; needs the package compressed-tensors (0.18 or newer), "
        "experts expand while loading",
    }
    return {"transformers": row, **engines(site, next(iter(experts.values())), target.linears)}


def _gptq_loadable(site: MoESite, schemes: set[Scheme]) -> dict[str, Any]:
    reason = "transformers stacks experts and has no GPTQ loader for that; GPTQModel's own loader keeps them apart"
    rows: dict[str, Any] = {"transformers": {"status": "no", "reason": reason}}
    scheme = next(iter(schemes))
    divides = scheme.group_size == -1 or not (site.hidden % scheme.group_size or site.width % scheme.group_size)
    if len(schemes) > 1 or scheme.bits not in (4, 8) or not divides:
        own = f"{scheme.bits} bits, group {scheme.group_size}"
        found = "mixed schemes among the experts" if len(schemes) > 1 else own
        engine = {"status": "no", "reason": f"{found}; its GPTQ experts have one scheme of 4 or 8 bits"}
    else:
        engine = {"status": "by_rule", "reason": f"GPTQ, symmetric, {scheme.bits} bits, one scheme. Not run here"}
    return {**rows, "vllm": engine, "sglang": engine}


def _licence(root: Path) -> str | None:
    """The `license:` of the directory's card."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"\A---\n(?:.*\n)*?license: (\S+)\n", text)
    return found[1] if found else None


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
