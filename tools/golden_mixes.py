"""Writes tests/golden/mixes.json: the types that llama.cpp's ``llama-quantize`` chooses for the matrices of V2-Lite.

    python tools/golden_mixes.py LLAMA_QUANTIZE VERSION

LLAMA_QUANTIZE is the program, built from VERSION of llama.cpp. It only plans (``--dry-run``), for which it looks at
names, shapes and metadata: the model's file is sparse, the importance matrix has one entry.
"""

import datetime
import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from gguf import LlamaFileType
from make_model import PRESETS, model_tensors, synthetic_tokenizer
from mixes import LLAMA_QUANTIZE, uniform

from pymla import ggml
from pymla.files import gguf_writer
from pymla.make.model_metadata import ARCHITECTURE, model_metadata

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mixes.json"
SHAPE = PRESETS["v2-lite"]

#: A converted tensor in the program's plan: its name and its new type.
CONVERTED = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .* -> .*\((\w+)\)$", re.MULTILINE)


def write_sparse_model(path: Path, layout: str) -> None:
    """V2-Lite in F16, with a hole in place of its weights."""
    tensors = list(model_tensors(SHAPE, layout, uniform(ggml.F16, ggml.F16), 0))
    metadata = model_metadata(SHAPE, layout, LlamaFileType.MOSTLY_F16) | synthetic_tokenizer(SHAPE.vocab_size)
    gguf_writer.write(path, ARCHITECTURE, metadata, [tensor._replace(pieces=lambda: ()) for tensor in tensors])
    with path.open("ab") as file:
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors))


def write_imatrix(path: Path) -> None:
    """An importance matrix of one tensor, whose columns weigh the same, in llama.cpp's format before GGUF."""
    name, columns = b"blk.0.attn_q.weight", SHAPE.hidden_size
    counts = struct.pack("<i", 1), struct.pack("<i", len(name)), struct.pack("<ii", 1, columns)
    path.write_bytes(counts[0] + counts[1] + name + counts[2] + struct.pack(f"<{columns}f", *[1.0] * columns))


def plan(program: str, model: Path, imatrix: Path, mix: str) -> dict[str, str]:
    """Names of types by names of matrices, without routers."""
    command = [program, "--imatrix", imatrix, "--dry-run", model, mix.upper()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return {name: qtype.upper() for name, qtype in CONVERTED.findall(done.stdout)}


def by_stem(types: dict[str, str]) -> dict[str, str | dict[str, str]]:
    """The types of `plan` in short: the type of a stem, or the layers of each of its types.

    >>> by_stem({"output.weight": "Q6_K", "blk.0.ffn_down.weight": "Q5_0", "blk.1.ffn_down.weight": "Q8_0"})
    {'output': 'Q6_K', 'ffn_down': {'Q5_0': '0', 'Q8_0': '1'}}
    """
    layers: dict[str, dict[str, list[int]]] = {}
    for name, qtype in types.items():
        *block, stem, _ = name.split(".")
        layers.setdefault(stem, {}).setdefault(qtype, []).append(int(block[1]) if block else 0)
    return {
        stem: next(iter(found)) if len(found) == 1 else {q: " ".join(map(str, sorted(n))) for q, n in found.items()}
        for stem, found in layers.items()
    }


def main(program: str, version: str) -> None:
    """Plan every mix in both layouts that llama.cpp reads."""
    mixes = {}
    with tempfile.TemporaryDirectory() as folder:
        imatrix = Path(folder) / "imatrix.dat"
        write_imatrix(imatrix)
        for layout in ("kv_b", "split"):
            model = Path(folder) / f"{layout}.gguf"
            write_sparse_model(model, layout)
            for mix in LLAMA_QUANTIZE:
                mixes.setdefault(mix, {})[layout] = by_stem(plan(program, model, imatrix, mix))
    about = {"program": "llama-quantize", "version": version, "date": datetime.date.today().isoformat()}
    GOLDEN.write_text(json.dumps(about | {"model": SHAPE.name, "mixes": mixes}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
