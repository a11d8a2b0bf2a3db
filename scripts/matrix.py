"""Try every registered pass on every supported tiny family, and write the table of the README.

    python scripts/matrix.py WORK [--pass NAME ...] [--family NAME ...] [--minutes 15]   # resumable
    python scripts/matrix.py WORK --plan      # only plans, of what was not run yet: seconds instead of minutes
    python scripts/matrix.py WORK --write     # tests/matrix.json and README.md from what WORK holds

WORK/rows.json keeps what was found; it starts as what tests/matrix.json holds. An error that is neither success nor a
refusal by the plan is kept as such and printed; it makes the exit code 1, and `--write` refuses it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # before this folder, whose matrix.py is this file
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other

import engine  # noqa: E402
import matrix  # noqa: E402
import pytest  # noqa: E402
import transformers  # noqa: E402

from moecompress import registry  # noqa: E402


def one(name: str, family: str, work: Path, planned: bool) -> dict[str, str]:
    """{} for success, {"planned": ""}, {"refused": reason} or {"error": text}."""
    folder = work / "run"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        found = matrix.attempt(matrix.steps_of(name), matrix.source(family, work / "models"), folder, planned=planned)
    except Exception as error:  # whatever it is, it is a finding
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    if found.refused is not None:
        return {"refused": found.refused}
    return {"planned": ""} if planned else {}


def known() -> dict[str, dict[str, str]]:
    """The rows of tests/matrix.json."""
    if not matrix.KEPT.is_file():
        return {}
    found, rows = matrix.kept(), {}
    for name in found["passes"]:
        for family in found["families"]:
            why = found["refused"].get(name, {}).get(family)
            planned = family in found["planned"].get(name, ())
            rows[f"{name} {family}"] = {"refused": why} if why is not None else {"planned": ""} if planned else {}
    return rows


def write(rows: dict[str, dict[str, str]]) -> None:
    """tests/matrix.json and the README's block. Raises SystemExit when something is missing or failed."""
    passes, families = list(registry.pass_names()), list(matrix.FAMILIES)
    missing = [f"{name} {family}" for name in passes for family in families if f"{name} {family}" not in rows]
    errors = [key for key, row in rows.items() if "error" in row]
    if missing or errors:
        raise SystemExit(f"not tried: {missing[:5]} ({len(missing)}); failed: {errors[:5]} ({len(errors)})")
    refused = {
        name: {family: why for family in families if (why := rows[f"{name} {family}"].get("refused")) is not None}
        for name in passes
    }
    planned = {name: [family for family in families if "planned" in rows[f"{name} {family}"]] for name in passes}
    found = {"passes": passes, "families": families, "refused": refused, "planned": planned}
    matrix.KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = matrix.README.read_text("utf-8")
    before, rest = text.split(matrix.BEGIN)
    matrix.README.write_text(before + matrix.table(found) + rest.split(matrix.END)[1], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pass", dest="passes", nargs="+", default=registry.pass_names())
    parser.add_argument("--family", nargs="+", default=matrix.FAMILIES)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--plan", action="store_true", help="plan what was not run yet")
    parser.add_argument("--write", action="store_true", help="write tests/matrix.json and README.md, run nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "rows.json"
    rows = json.loads(kept.read_text("utf-8")) if kept.is_file() else known()
    if options.write:
        write(rows)
        return 0
    transformers.utils.logging.disable_progress_bar()
    end = time.monotonic() + 60 * options.minutes
    with pytest.MonkeyPatch.context() as patch:
        engine.reload_here(patch)
        for family in options.family:
            for name in options.passes:
                key = f"{name} {family}"
                row = rows.get(key, {"error": ""})
                if time.monotonic() > end or not ("error" in row or ("planned" in row and not options.plan)):
                    continue
                began = time.monotonic()
                rows[key] = one(name, family, options.work, options.plan)
                kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                print(f"{key}: {rows[key] or 'ok'} {time.monotonic() - began:.1f} s", flush=True)
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
