"""How close engines are to what a file says: files of every type, made here and by other programs, in several engines.

The reference runs each file in float32, and its log-probabilities are the base; then pymla's kernels, llama.cpp and
ik_llama.cpp run the same file on the same tokens, which they take from the base. The error of a ratio of perplexities
is that of paired tokens, so that differences far below a perplexity's own error show.

Work goes on where it stopped: results are kept in FOLDER, with the model (`tools/widen_demo.py`) and the text's base.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import widen_demo

from pymla.engine.loading import demo_path
from pymla.files import outputs
from pymla.make.mixes import mix_named
from pymla.make.recipe import NEED_IMPORTANCE

EXAMPLES = """\b
Example:
  python tools/compare_engines.py /disk/scratch heldout.txt calibration.txt --llama ~/llama.cpp/build/bin \\
      --ik ~/ik_llama.cpp/build/bin --types Q4_K,IQ4_XS
"""

#: Types of llama.cpp, and those of ik_llama.cpp alone, by the names of llama-quantize, where IQ2_M is that of IQ2_S.
TYPES = (
    *("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4_MOE", "Q3_K", "IQ3_S"),
    *("IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0"),
)
IK_TYPES = ("IQ6_K", "IQ5_K", "IQ5_KS", "IQ4_K", "IQ4_KS", "IQ3_K", "IQ3_KS", "IQ2_K", "IQ2_KS")

HERE, LLAMA, IK = "pymla", "llama.cpp", "ik_llama.cpp"
CTX = 512
#: How often llama-perplexity is run: some of its runs end before everything is printed.
TRIES = 5


class Engines(NamedTuple):
    """Where programs are, and how many threads they take."""

    llama: Path | None
    ik: Path | None
    threads: int

    def folders(self) -> dict[str, Path]:
        """The folders of the other engines' programs."""
        return {name: path for name, path in ((LLAMA, self.llama), (IK, self.ik)) if path is not None}


class Inputs(NamedTuple):
    """What all files are made of and measured on."""

    model: Path
    imatrix: Path
    dat: Path  # the same for ik_llama.cpp
    text: Path


def pymla(*arguments: object) -> str:
    """What a command prints. Where it refuses, so does this program."""
    return _run([sys.executable, "-m", "pymla", *map(str, arguments)])


def _run(command: Sequence[str]) -> str:
    # The programs of both engines print bytes of unfinished characters.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise click.ClickException(f"{Path(command[0]).name}: {lines[-1] if lines else 'it printed nothing'}")
    return done.stdout


def prepare(folder: Path, text: Path, calibration: Path, threads: int) -> Inputs:
    """The model and its importance matrix, which are made if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Inputs(folder / "model.gguf", folder / "imatrix.gguf", folder / "imatrix.dat", text)
    if not found.model.exists():
        widen_demo.write(found.model, demo_path())
    if not found.imatrix.exists():
        options = "-f", calibration, "--chunks", 40, "--no-ppl", "--threads", threads
        pymla("imatrix", "-m", found.model, "-o", found.imatrix, *options)
    if not found.dat.exists():
        pymla("imatrix", "--in-file", found.imatrix, "-o", found.dat)
    return found


def make(maker: str, qtype: str, inputs: Inputs, path: Path, engines: Engines) -> None:
    """Write a file whose matrices, but for routers, all have one type. llama-quantize has no importance matrix for
    embeddings and output: where the type needs one, they have Q8_0."""
    outer = "--output-tensor-type", "Q8_0", "--token-embedding-type", "Q8_0"
    options = ["--pure", *(outer if mix_named(qtype).qtype in NEED_IMPORTANCE else ())]
    if maker == HERE:
        pymla("quantize", inputs.model, path, qtype, *options, "--imatrix", inputs.imatrix)
        return
    options += ["--imatrix", str(inputs.imatrix if maker == LLAMA else inputs.dat)]
    program = engines.folders()[maker] / "llama-quantize"
    _run([str(program), *options, str(inputs.model), str(path), qtype, str(engines.threads)])


def compare(engine: str, path: Path, base: Path, engines: Engines) -> dict[str, Any]:
    """An engine's perplexity and divergence from a base, each [value, error]."""
    if engine == HERE:
        options = "--device", "cpu", "--cache-type", "f16", "--threads", engines.threads
        found = json.loads(pymla("perplexity", "-m", path, "--kl", base, "--json", *options))
        parts = {"ppl": found["perplexity"], "log_ratio": found["log_ratio"], "kld": found["divergence"]["mean"]}
        return {name: [part["value"], part["error"]] for name, part in parts.items()}
    program = str(engines.folders()[engine] / "llama-perplexity")
    options = ["-c", str(CTX), "-t", str(engines.threads), *(["-mla", "0"] if engine == IK else [])]
    names = {"ppl": r"Mean PPL\(Q\)", "log_ratio": r"Mean ln\(PPL\(Q\)/PPL\(base\)\)", "kld": "Mean +KLD"}
    for _ in range(TRIES):
        text = _run([program, "-m", str(path), "--kl-divergence", "--kl-divergence-base", str(base), *options])
        found = {name: re.search(rf"{pattern} *: *(\S+) ± *(\S+)", text) for name, pattern in names.items()}
        if all(found.values()):
            return {name: [float(each) for each in match.groups()] for name, match in found.items() if match}
    raise click.ClickException(f"{program}: it printed no result in {TRIES} runs")


def runs(types: Sequence[str], engines: Engines) -> Iterator[tuple[str, str, list[str]]]:
    """Makers, types, and the engines that run the file."""
    for qtype in types:
        for maker in (HERE, IK if qtype in IK_TYPES else LLAMA):
            if maker == HERE or maker in engines.folders():
                others = [name for name in engines.folders() if name == IK or qtype in TYPES]
                yield maker, qtype, [HERE, *others]


def measure(maker: str, qtype: str, wanted: Sequence[str], inputs: Inputs, engines: Engines, chunks: int) -> dict:
    """The record of a file."""
    with tempfile.TemporaryDirectory(dir=inputs.model.parent) as place:
        path, base = Path(place, "model.gguf"), Path(place, "base.kld")
        make(maker, qtype, inputs, path, engines)
        options = "--chunks", chunks, "--ctx", CTX, "--device", "reference", "--cache-type", "f32", "--json"
        found = json.loads(pymla("perplexity", "-m", path, "-f", inputs.text, "--kl-base", base, *options))
        record: dict[str, Any] = {"maker": maker, "type": qtype, "bytes": path.stat().st_size}
        record["exact"] = [found["perplexity"]["value"], found["perplexity"]["error"]]
        for engine in wanted:
            try:
                record[engine] = compare(engine, path, base, engines)
            except click.ClickException as error:
                record[engine] = {"refused": error.message}
        return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records in Markdown: perplexities beside the exact one, in hundredths."""
    engines = [HERE, LLAMA, IK]
    lines = [f"| type | made by | exact | {' | '.join(engines)} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for record in records:
        cells = [record["type"], record["maker"], f"{record['exact'][0]:.3f}"]
        cells += [_cell(record.get(engine)) for engine in engines]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return "refused" if "refused" in found else "{:+.3%} ± {:.3%}".format(*found["log_ratio"])


@click.command(epilog=EXAMPLES)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--llama", type=click.Path(exists=True, path_type=Path), help="Folder of llama.cpp's programs.")
@click.option("--ik", type=click.Path(exists=True, path_type=Path), help="Folder of ik_llama.cpp's programs.")
@click.option("--types", help="[default: all of llama.cpp, and with --ik those of ik_llama.cpp]")
@click.option("--chunks", default=64, show_default=True, help=f"Windows of {CTX} tokens.")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
def main(folder, text, calibration, llama, ik, types, chunks, threads):
    """Compare engines on TEXT, with files whose importance matrix comes from CALIBRATION."""
    engines, results = Engines(llama, ik, threads), folder / "results.json"
    names = types.split(",") if types else [*TYPES, *(IK_TYPES if ik else ())]
    inputs = prepare(folder, text, calibration, threads)
    records = json.loads(results.read_text()) if results.exists() else []
    for maker, qtype, wanted in runs(names, engines):
        if any((each["maker"], each["type"]) == (maker, qtype) for each in records):
            continue
        click.echo(f"{maker} {qtype}", err=True)
        records.append(measure(maker, qtype, wanted, inputs, engines, chunks))
        outputs.write(results, (json.dumps(records, indent=1) + "\n").encode())
    click.echo(table(records))


if __name__ == "__main__":
    main()
