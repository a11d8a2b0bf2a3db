"""`moecompress export`: plan the conversion, write it beside the target, compare, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from moecompress.arch.sites import router_matrix
from moecompress.checkpoint.writer import ShardRecord, write_shard
from moecompress.errors import MoecompressError, OutputError, Stopped, message
from moecompress.export.convert import Converted, Target, convert_layer, same_values, without_biases
from moecompress.export.describe import Export, describe
from moecompress.export.fit import ExportFormat, Fit, activation_losses, common_fit, container_bits, linear_fit, own_fit
from moecompress.export.source import Output, open_output
from moecompress.parts import split_entries
from moecompress.portable import layout_problems
from moecompress.progress import NoProgress, Progress

FORMATS: tuple[ExportFormat, ...] = ("portable", "container", "dense", "gptq")
SHARD_BYTES = 4 << 30


def export_dir(
    root: Path, form: ExportFormat, out: Path, *, allow_lossy: bool = False, progress: Progress | None = None
) -> Path:
    """Convert the output directory `root` to `form` in the new directory `out`; returns `out`.

    Everything is refused that would not keep every value exactly (dense: rounded once to the checkpoint's dtype),
    unless allow_lossy: then only the matrices that do not fit are rounded again. `out` appears when it is complete.
    Raises OutputError with every reason, and CheckpointError or UnsupportedModel for what `root` is.
    """
    shown = progress or NoProgress()
    if form not in FORMATS:
        raise OutputError(message("--format", f"'{form}'", ", ".join(FORMATS)))
    _check_free(root, out)
    output = without_biases(open_output(root))
    target, losses = choose(output, form, allow_lossy)
    for loss in losses:
        shown.note(f"lost: {loss}")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        made, records = _write(output, target, staging, shown)
        describe(Export(output, target, staging, made, records, losses))
        if form in ("portable", "container") and not losses:
            _compare(output, staging)
        staging.chmod(0o755)
        os.rename(staging, out)
    except Stopped as error:
        raise OutputError(f"{error.args[0].partition('. Next')[0]}. Next: free some space and export again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out


def choose(output: Output, form: ExportFormat, allow_lossy: bool) -> tuple[Target, tuple[str, ...]]:
    """What to write, and what is lost by it. Raises OutputError with every reason when that is not allowed."""
    experts, linears = output.expert_schemes(), output.linear_schemes()
    if form == "dense":
        fits = [Fit(None, tuple(activation_losses([*experts, *linears])))]
    elif form == "gptq":
        fits = [own_fit(experts), own_fit(linears)]
    else:
        width = container_bits(experts) if form == "container" else None
        fits = [common_fit(experts, width), linear_fit(linears, form == "container")]
    never = [] if form == "dense" else layout_problems(output.layout)
    native = output.model.native
    if native is not None and native.gates:
        never.append("tokens leave out some of their experts per token, which only native outputs can say")
    if form != "dense" and any(_is_router(output, module) for module in output.linears):
        never.append("routers have codes, which only native outputs can say")
    if native is not None and form != "dense" and any(module.turns for module in native.experts.values()):
        never.append("experts turn their inputs while they run, which the format cannot say (--format dense can)")
    if form == "gptq":
        never += _ragged(output)
    losses = tuple(dict.fromkeys(loss for fit in fits for loss in fit.losses))
    if never or losses and not allow_lossy:
        lossy = "" if never else ", or --allow-lossy, which rounds what does not fit again"
        raise OutputError(
            message(
                f"{output.root}: --format {form}",
                "; ".join([*never, *losses]),
                then=f"keep {_kind(output)}, choose another format{lossy}",
            )
        )
    linear = fits[1].scheme if len(fits) > 1 else None
    return Target(form, fits[0].scheme, linear, allow_lossy, output.model.facts.dtype), losses


def _is_router(output: Output, module: str) -> bool:
    found = {layer.name: router_matrix(layer) for layer in output.model.facts.moe_layers}
    return any(names is not None and f"{layer}.{names[0]}" == f"{module}.weight" for layer, names in found.items())


def _ragged(output: Output) -> list[str]:
    """Sizes of experts that GPTQ's packing along both dimensions does not take."""
    sites = [layer.site for layer in output.model.facts.moe_layers if layer.site is not None]
    sizes = {size for site in sites for size in (site.hidden, site.width) if size % 32}
    return [f"GPTQ packs experts of multiples of 32, not of {sorted(sizes)}"] if sizes else []


def _kind(output: Output) -> str:
    return "native" if output.model.native is not None else "portable"


def _check_free(root: Path, out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(message(f"--out '{out}'", "exists", "a directory that does not exist yet"))
    if out.resolve().is_relative_to(root.resolve()):
        raise OutputError(message(f"--out '{out}'", f"lies inside '{root}'", "a directory outside it"))


def _write(
    output: Output, target: Target, staging: Path, progress: Progress
) -> tuple[Mapping[int | None, Converted], list[ShardRecord]]:
    """All shards, one layer in memory at a time, named once their number is known."""
    layers: list[int | None] = [None, *range(len(output.model.facts.layers))]
    made: dict[int | None, Converted] = {}
    written: list[ShardRecord] = []
    progress.stage(f"export to {target.format}", len(layers))
    for index in layers:
        part = convert_layer(output, target, index)
        for group in split_entries(part.entries, SHARD_BYTES):
            written.append(write_shard(staging / f"part-{len(written):05d}.safetensors", group))
        part.entries.clear()  # they hold the layer's weights
        made[index] = part
        progress.step("outside the layers" if index is None else f"layer {index}")
    records = []
    for number, record in enumerate(written, start=1):
        name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.replace(staging / record.file, staging / name)
        records.append(ShardRecord(name, record.tensors, record.bytes))
    return made, records


def _compare(output: Output, staging: Path) -> None:
    """Read the result back. Raises OutputError when a value differs (or the result cannot be read)."""
    try:
        written = without_biases(open_output(staging))
    except MoecompressError as error:
        raise OutputError(message("export", f"the result cannot be read: {error}")) from error
    wrong = [index for index in output.sources if not same_values(output, written, index)]
    if wrong:
        raise OutputError(message("export", f"layers {wrong[:5]} differ from the source", then="report this"))
