"""Writes tests/golden/perplexity.json and perplexity.kld: what llama.cpp's ``llama-perplexity`` says of small models.

    python tools/golden_perplexity.py LLAMA_PERPLEXITY VERSION

LLAMA_PERPLEXITY is the program, built from VERSION of llama.cpp. It reads tests/golden/perplexity.txt with the demo
model and with tests/golden/v3.gguf; a copy of the latter in Q8_0 and one of the former in Q4_0 are compared with them.
The cache is in float32.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pymla import ggml
from pymla.engine.loading import demo_path
from pymla.files import gguf_writer
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.reference.quant import dequantise, quantise

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
GOLDEN = ROOT / "tests" / "golden"
TEXT, V3 = GOLDEN / "perplexity.txt", GOLDEN / "v3.gguf"
#: Tokens of a window, and how many windows: of the file that is kept, and of the demo model.
CTX, CHUNKS, DEMO_CTX, STRIDE = 64, 4, 256, 32
#: Questions of a file.
TASKS = 24

OPTIONS = "-t", "2", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"


def quantised_copy(source: Path, path: Path, qtype: int = ggml.Q8_0) -> Path:
    """A copy of a GGUF file in float32 whose matrices, but for routers and norms, have another type."""
    file = ModelFile.open(source)

    def new(tensor) -> NewTensor:
        fits = len(tensor.shape) > 1 and tensor.shape[-1] % ggml.BLOCK_SIZE[qtype] == 0
        if not fits or "ffn_gate_inp" in tensor.name:
            return NewTensor(tensor.name, tensor.shape, tensor.qtype, lambda: [tensor.data])
        rows = tensor.data.reshape(*tensor.shape[:-1], -1)
        return NewTensor(tensor.name, tensor.shape, qtype, lambda: [quantise(dequantise(rows, tensor.qtype), qtype)])

    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    gguf_writer.write(
        path, file.metadata["general.architecture"], metadata, [new(each) for each in file.tensors.values()]
    )
    return path


class Program:
    """llama-perplexity."""

    def __init__(self, path: str):
        self._path = path

    def run(self, *options, last: str) -> str:
        """What it prints, with a match of `last` at its end: some of its runs end before everything is printed."""
        command = [self._path, *map(str, options), *OPTIONS]
        for _ in range(20):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode == 0 and re.search(last, done.stdout, re.MULTILINE):
                return done.stdout
        sys.exit(done.stdout[-2000:])

    def perplexity(self, model: Path, *options) -> dict:
        """The estimates after each window, and the final one with its error."""
        text = self.run("-m", model, "-f", TEXT, *options, last="PPL = ")
        final = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", text).groups()
        return {"running": _running(text), "final": [float(each) for each in final]}

    def strided(self, model: Path) -> list[float]:
        """The estimates after each window of `DEMO_CTX` tokens. The program adds half of the stride to its context."""
        window = "-c", DEMO_CTX - STRIDE // 2, "-b", DEMO_CTX, "--ppl-stride", STRIDE, "--chunks", CHUNKS
        return _running(self.run("-m", model, "-f", TEXT, *window, last=rf"\[{CHUNKS}\]"))

    def comparison(self, model: Path, base: Path, ctx: int) -> dict:
        """All statistics by their names: [value] or [value, error]."""
        options = "-m", model, "--kl-divergence", "--kl-divergence-base", base, "-c", ctx
        text = self.run(*options, last="^Same top p.*%$")
        lines = re.findall(r"^ *([^:\n]*(?:PPL|KLD|Δp|top p)[^:\n]*?) *: *(-?\d.*)$", text, re.MULTILINE)
        return {
            re.sub(r" +", " ", name): [float(each) for each in re.findall(r"-?\d+\.\d+", numbers)]
            for name, numbers in lines
        }

    def choices(self, model: Path, kind: str, path: Path, count: int) -> list[list[float]]:
        """After each task the share in per cent, and for Winogrande the scores of both words."""
        options = "-m", model, f"--{kind}", "-f", path, f"--{kind}-tasks", count, "-c", 2048
        text = self.run(*options, last=rf"^{count}\t[\d.]+")
        lines = re.findall(r"^\d+\t(\d+\.\d+)(?:\t *(-\d+\.\d+) +(-\d+\.\d+) )?", text, re.MULTILINE)
        return [[float(each) for each in line if each] for line in lines]


def _running(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"\[\d+\]([\d.]+),", text)]


def main(program: str, version: str) -> None:
    import question_files  # of the tests

    found = Program(program)
    made = question_files.questions(TEXT.read_text(), TASKS)
    with tempfile.TemporaryDirectory() as folder:
        small, base = quantised_copy(V3, Path(folder, "v3-q8_0.gguf")), GOLDEN / "perplexity.kld"
        window = "-c", CTX, "--chunks", CHUNKS
        golden = {
            "v3": found.perplexity(V3, *window, "--kl-divergence-base", base),
            "demo": found.perplexity(demo_path(), "-c", DEMO_CTX),
            "stride": found.strided(demo_path()),
            "comparison": found.comparison(small, base, CTX),
        }
        own = Path(folder, "demo.kld")
        found.perplexity(demo_path(), "-c", DEMO_CTX, "--chunks", CHUNKS, "--kl-divergence-base", own)
        smaller = quantised_copy(demo_path(), Path(folder, "demo-q4_0.gguf"), ggml.Q4_0)
        golden["demo comparison"] = found.comparison(smaller, own, DEMO_CTX)
        for kind, data, count in (
            ("hellaswag", question_files.hellaswag(made), TASKS),
            ("winogrande", question_files.winogrande() + b"\n", len(question_files.SENTENCES)),
            ("multiple-choice", question_files.multiple_choice(made), TASKS),
            ("multiple-choice", question_files.multiple_choice(made), TASKS // 2),
        ):
            path = Path(folder, kind)
            path.write_bytes(data)
            golden[f"{kind} {count}"] = found.choices(demo_path(), kind, path, count)
    provenance = {
        "command": "python tools/golden_perplexity.py",
        "program": f"llama-perplexity of {version}",
        "options": " ".join(OPTIONS),
        "date": datetime.date.today().isoformat(),
        "ctx": CTX,
        "chunks": CHUNKS,
        "demo_ctx": DEMO_CTX,
        "stride": STRIDE,
        "tasks": TASKS,
    }
    text = json.dumps({"provenance": provenance, "results": golden}, indent=1, ensure_ascii=False)
    (GOLDEN / "perplexity.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
