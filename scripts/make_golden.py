"""Write tests/golden.json, the packed bytes that every packer has to give, from the definitions in tests/golden.py.

    python scripts/make_golden.py [--out FILE]

Only a deliberate change of a format changes the file; a test compares it with what this writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import golden  # noqa: E402


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=golden.KEPT)
    out: Path = parser.parse_args(words).out
    out.write_text(json.dumps(golden.vectors(), indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
