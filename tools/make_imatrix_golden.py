"""Golden importance matrices: what llama.cpp's llama-imatrix collects from small random models.

The tests make the same models, collect from them and compare. Needs llama.cpp's program.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from make_golden import SHAPES
from make_model import make_model

from pymla.errors import PymlaError

#: Layouts of kv_b. llama.cpp multiplies by the whole of it in one, and per head in the other.
LAYOUTS = ("kv_b", "split")
CTX = 32
#: Three chunks and a part of one. It says so little that some experts get no token.
TEXT = "1 times 1 is 1 " * 8

EXAMPLES = """\b
Example:
  python tools/make_imatrix_golden.py llama.cpp/build/bin/llama-imatrix tests/golden/imatrix
"""


def make(path: Path, layout: str) -> Path:
    """The model of a layout, in float32, where no rounding of activations chooses other experts."""
    return make_model(path, SHAPES["v3"], layout=layout, qtype="f32", seed=7)


def collect(program: str, layout: str, out: Path) -> list[str]:
    """Run llama-imatrix, with a float32 cache and a chunk at a time. Returns the command."""
    with tempfile.TemporaryDirectory() as folder:
        model, text = make(Path(folder, "model.gguf"), layout), Path(folder, "text.txt")
        text.write_text(TEXT)
        options = ["-c", CTX, "-b", CTX, "-ub", CTX, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-ppl", "-t", 1]
        command = [str(each) for each in (program, "-m", model, "-f", text, "-o", out, *options, "--process-output")]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode or not out.exists():
            last = run.stderr.strip().splitlines()[-1:] or ["no message"]
            raise PymlaError(f"{program}: failed with code {run.returncode}: {last[0]}")
        return ["llama-imatrix", *(part.replace(folder + "/", "") for part in command[1:])]


@click.command(epilog=EXAMPLES)
@click.argument("program")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(program, folder):
    """Write golden importance matrices and their provenance into FOLDER, by PROGRAM, which is llama-imatrix."""
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"date": datetime.date.today().isoformat(), "program": "llama-imatrix of llama.cpp", "commands": {}}
    try:
        about = subprocess.run([program, "--version"], capture_output=True, text=True)
        provenance["version"] = (about.stdout + about.stderr).strip().splitlines()[0]
        for layout in LAYOUTS:
            out = folder / f"{layout}.gguf"
            out.unlink(missing_ok=True)
            provenance["commands"][out.name] = " ".join(collect(program, layout, out)).replace(str(folder) + "/", "")
    except (OSError, PymlaError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
