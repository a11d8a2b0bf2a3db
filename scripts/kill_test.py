#!/usr/bin/env python3
"""Kill runs of the demo checkpoint at random moments, resume them, and compare every byte with an undisturbed run.

scripts/kill_test.py [N] [--set key=value ...] prints one line per kill; exit code 1 if a result differs. A moment is
a random share of the time that the undisturbed run took, and every third run is killed twice.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPARED = ("model.safetensors.index.json", "config.json", "moecompress/recipe.yaml", "moecompress/manifest.json")
RECIPE = """\
model: {model}
calibration: {{source: manifest, manifest: python-stdlib, samples: 64, length: 256, seed: 0}}
passes:
  - quantize.rtn: {{bits: 3, group_size: 32, targets: [routed_experts, attention]}}
output: {{dir: {out}, format: native, shard_size: 500KiB}}
"""


def command(recipe: Path, settings: list[str], *options: str) -> list[str]:
    """The command line as a process of its own; `-P` keeps the working directory off the module path."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-P", "-m", "moecompress", "run", str(recipe), *overrides, *options]


def contents(out: Path) -> dict[str, bytes]:
    """What must not depend on interruptions, by file name."""
    names = [*(path.name for path in sorted(out.glob("*.safetensors"))), *COMPARED]
    return {name: (out / name).read_bytes() for name in names}


def complete(arguments: list[str]) -> float:
    """Run to the end; seconds. Exits with the process's message when it fails."""
    began = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\nexit code {done.returncode}\n{done.stderr}")
    return time.monotonic() - began


def kill_after(arguments: list[str], seconds: float) -> str:
    """Kill the run after so many seconds; the last thing it said. Raises ValueError when it ended before."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.stderr is not None
        said = process.stderr.read().strip().splitlines()
    if process.returncode == 0:
        raise ValueError("it had ended already")
    if process.returncode > 0:
        sys.exit("\n".join(said))
    return said[-1][:60] if said else "(nothing yet)"


def main() -> None:
    """Print the table; exit code 1 when a resumed run gave other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=20, help="number of killed runs (default 20)")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of the recipe"
    )
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "checkpoints" / "bench-a", help="a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args()
    generator, wrong = random.Random(chosen.seed), 0
    with tempfile.TemporaryDirectory(prefix="moecompress-kill-") as folder:
        out, recipe = Path(folder) / "out", Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=chosen.model.resolve(), out=out))
        whole = complete(command(recipe, chosen.settings))
        wanted = contents(out)
        shutil.rmtree(out)
        print(f"undisturbed: {whole:.1f} s, {len(wanted)} files, {sum(map(len, wanted.values()))} bytes", flush=True)
        for number in range(1, chosen.kills + 1):
            moments, said = [], []
            for _ in range(2 if number % 3 == 0 else 1):
                moments.append(generator.uniform(0.2, 1.0) * whole)
                try:
                    said.append(kill_after(command(recipe, chosen.settings, "--resume"), moments[-1]))
                except ValueError as error:
                    said.append(str(error))
                    break
            if not out.exists() or out.with_name("out.run").exists():
                complete(command(recipe, chosen.settings, "--resume"))
            found = contents(out)
            same = found == wanted and not out.with_name("out.run").exists()
            wrong += not same
            shutil.rmtree(out)
            times = " and ".join(f"{moment:.1f} s" for moment in moments)
            print(f"{number:3}  {'same' if same else 'DIFFERENT':<10} killed at {times}: {'; '.join(said)}", flush=True)
    print(f"{chosen.kills - wrong} of {chosen.kills} resumed runs are byte-identical")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
