"""Writes tests/golden/mixes.json: the types that llama.cpp's ``llama-quantize`` chooses for the matrices of models.

    python tools/golden_mixes.py LLAMA_QUANTIZE VERSION

LLAMA_QUANTIZE is the program, built from VERSION of llama.cpp. It only plans (``--dry-run``), for which it looks at
names, shapes and metadata: a model's file is sparse, the importance matrix has one entry.
"""

import dataclasses
import datetime
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gguf import LlamaFileType
from make_model import PRESETS, model_tensors, synthetic_tokenizer
from model_mixes import uniform

from pymla import ggml
from pymla.files import gguf_writer
from pymla.make.mixes import LLAMA_MIXES
from pymla.make.model_metadata import Shape, model_metadata

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "mixes.json"

#: Models and the layouts of each: experts and none, eight experts, an indexer, tied embeddings.
MODELS: dict[str, tuple[Shape, tuple[str, ...]]] = {
    "v2-lite": (PRESETS["v2-lite"], ("kv_b", "split")),
    "v3": (PRESETS["v3"], ("kv_b", "split")),
    "v2-lite with 8 experts": (dataclasses.replace(PRESETS["v2-lite"], n_routed_experts=8), ("kv_b", "split")),
    "v3.2": (PRESETS["v3.2"], ("split",)),
    "minicpm3-4b": (PRESETS["minicpm3-4b"], ("kv_b",)),
}

#: Mixes that change the type of a file in F16.
NAMES = [name for name in LLAMA_MIXES if name != "F16"]

#: A converted tensor in the program's plan: its name and its new type.
CONVERTED = re.compile(r"^\[ *\d+/ *\d+\] (\S+) .* -> .*\((\w+)\)$", re.MULTILINE)


def write_sparse_model(path: Path, shape: Shape, layout: str) -> None:
    """A model in F16, with a hole in place of its weights."""
    tensors = list(model_tensors(shape, layout, uniform(ggml.F16, ggml.F16), 0))
    metadata = model_metadata(shape, layout, LlamaFileType.MOSTLY_F16) | synthetic_tokenizer(shape.vocab_size)
    gguf_writer.write(path, shape.architecture, metadata, [tensor._replace(pieces=tuple) for tensor in tensors])
    with path.open("ab") as file:
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors))


def write_imatrix(path: Path) -> None:
    """An importance matrix of one tensor, whose columns weigh the same, in llama.cpp's format before GGUF."""
    name, columns = b"blk.0.attn_q.weight", 2048
    counts = struct.pack("<i", 1), struct.pack("<i", len(name)), struct.pack("<ii", 1, columns)
    path.write_bytes(counts[0] + counts[1] + name + counts[2] + struct.pack(f"<{columns}f", *[1.0] * columns))


def plan(program: str, model: Path, mix: str, imatrix: Path | None) -> dict[str, str]:
    """Names of types by names of the tensors that change their type."""
    options = [] if imatrix is None else ["--imatrix", imatrix]
    command = [program, *options, "--dry-run", model, mix]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return {name: qtype.upper() for name, qtype in CONVERTED.findall(done.stdout)}


def in_short(types: dict[str, str]) -> dict[str, str | int | dict[str, str]]:
    """The types of `plan`: how many tensors there are, the type of most stems as that of "*", and for every other stem
    its type, or the layers of each of its types.

    >>> names = "output.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "blk.0.ffn_down.weight"
    >>> in_short(dict(zip(names, ("Q4_0", "Q4_0", "Q4_0", "Q5_0"))))
    {'tensors': 4, '*': 'Q4_0', 'ffn_down': 'Q5_0'}
    >>> in_short({"blk.0.ffn_down.weight": "Q5_0", "blk.1.ffn_down.weight": "Q8_0"})
    {'tensors': 2, '*': '', 'ffn_down': {'Q5_0': '0', 'Q8_0': '1'}}
    """
    layers: dict[str, dict[str, list[int]]] = {}
    for name, qtype in sorted(types.items()):
        *block, stem, _ = name.split(".")
        layers.setdefault(stem, {}).setdefault(qtype, []).append(int(block[1]) if block else 0)
    single = Counter(next(iter(found)) for found in layers.values() if len(found) == 1)
    usual = max(sorted(single), key=lambda qtype: single[qtype], default="")
    rest = {
        stem: next(iter(found)) if len(found) == 1 else {q: numbers(found[q]) for q in sorted(found)}
        for stem, found in layers.items()
        if list(found) != [usual]
    }
    return {"tensors": len(types), "*": usual, **rest}


def numbers(layers: Iterable[int]) -> str:
    """Numbers in ascending order, runs of them by their ends.

    >>> numbers([5, 1, 2, 3])
    '1-3 5'
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return " ".join("-".join(map(str, run)) for run in runs)


def main(program: str, version: str) -> None:
    """Plan every mix for every model, in the layouts that llama.cpp reads."""
    found: dict[str, dict[str, dict[str, dict]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        imatrix, model = Path(folder) / "imatrix.dat", Path(folder) / "model.gguf"
        write_imatrix(imatrix)
        for name, (shape, layouts) in MODELS.items():
            for layout in layouts:
                write_sparse_model(model, shape, layout)
                plans = {
                    kind: {mix: in_short(plan(program, model, mix, given)) for mix in NAMES}
                    for kind, given in (("with", imatrix), ("without", None))
                }
                # Most mixes do not ask whether there is an importance matrix.
                plans["without"] = {
                    mix: types for mix, types in plans["without"].items() if types != plans["with"][mix]
                }
                found.setdefault(name, {})[layout] = plans
                print(name, layout)
    about = {"program": "llama-quantize", "version": version, "date": datetime.date.today().isoformat()}
    GOLDEN.write_text(json.dumps(about | {"models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
