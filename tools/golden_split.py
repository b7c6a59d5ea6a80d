"""Writes tests/golden/split.json: digests of what llama.cpp's ``llama-gguf-split`` makes of tests/golden/v3.gguf.

    python tools/golden_split.py LLAMA_GGUF_SPLIT VERSION

LLAMA_GGUF_SPLIT is the program, built from VERSION of llama.cpp.
"""

import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
#: How the file is split, as options of the program.
LIMITS = {"max_tensors": ("--split-max-tensors", "7"), "max_size": ("--split-max-size", "1M")}


def digests(paths: list[Path]) -> list[str]:
    """SHA-256 of files, as text."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def main(program: str, version: str) -> None:
    made = {}
    with tempfile.TemporaryDirectory() as place:
        for name, options in LIMITS.items():
            prefix, whole = Path(place, name), Path(place, f"{name}-merged.gguf")
            subprocess.run([program, "--split", *options, str(GOLDEN / "v3.gguf"), str(prefix)], check=True)
            parts = sorted(prefix.parent.glob(f"{name}-0*"))
            subprocess.run([program, "--merge", str(parts[0]), str(whole)], check=True)
            made[name] = {"options": options, "parts": digests(parts), "merged": digests([whole])[0]}
    provenance = {
        "command": "python tools/golden_split.py",
        "program": f"llama-gguf-split of {version}",
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps({"provenance": provenance, "made": made}, indent=1)
    (GOLDEN / "split.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
