"""Errors and speed of the quantisers, in one table from one run: ``python bench/quantise.py``.

Weights are normal, 2048 rows of V2-Lite's 10,944 columns, or of the next smaller multiple of 256. Every type is
quantised without importance and with one, by all cores. With ``--ggml`` llama.cpp's functions do the same, on as many
threads, in the same run; with ``--ik`` those of ik_llama.cpp, for the types that only it has. Shown are

- the weighted squared error, relative to the weighted squares of the weights, and its ratio to theirs;
- millions of weights per second, and the ratio to theirs;
- the share of the limit, which is the rate of copying as many float32 through the same threads (type F32).
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tools")]

from ggml_library import GgmlLibrary  # noqa: E402
from golden_quantise import IK_TYPES, LLAMA_TYPES, weighted_error  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shares import round_count, seconds_of  # noqa: E402

from pymla import cpu, ggml  # noqa: E402
from pymla.cpu.quantise import QUANTISERS, quantise  # noqa: E402
from pymla.errors import PymlaError  # noqa: E402
from pymla.files import outputs  # noqa: E402

ROWS, COLUMNS = 2048, 10752
#: Rows whose error is taken.
CHECKED = 64
#: Seconds of each measurement.
SECONDS = 1.0
WIDTH = 120


def weights(rows: int) -> np.ndarray:
    """Weights of about the size of a model's."""
    return np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)


def importance() -> np.ndarray:
    """Importance of columns, of which the largest are some hundred times the smallest."""
    return np.exp(np.random.default_rng(1).standard_normal(COLUMNS, np.float32))


def rate_of(run: Callable[[], object], count: int) -> float:
    """Weights per second of the fastest round."""
    return count / min(seconds_of(run) for _ in range(round_count(run, SECONDS)))


class Peer:
    """Another engine's quantisers, on as many threads as ours."""

    def __init__(self, library: GgmlLibrary, pool: ThreadPoolExecutor):
        self._library, self._pool = library, pool

    def measure(self, x: np.ndarray, qtype: int, columns: np.ndarray | None) -> dict[str, float] | None:
        """Weights per second and error; None where the type needs an importance."""
        if columns is None and self._library.needs_importance(qtype):
            return None
        self._library.prepare(qtype)
        out = np.empty((len(x), ggml.row_bytes(qtype, x.shape[1])), np.uint8)
        parts = np.array_split(np.arange(len(x)), 8 * cpu.thread_count())

        def part(rows: np.ndarray) -> None:
            begin, end = rows[0], rows[-1] + 1
            self._library.quantise(x[begin:end], qtype, columns, out[begin:end])

        rate = rate_of(lambda: list(self._pool.map(part, parts)), x.size)
        return {"weights_per_s": rate, "error": weighted_error(out[:CHECKED], qtype, x[:CHECKED], columns)}


def measure(x: np.ndarray, qtype: int, columns: np.ndarray | None, peer: Peer | None) -> dict[str, Any]:
    """A type's record."""
    out = quantise(x, qtype, columns)
    rate = rate_of(lambda: quantise(x, qtype, columns, out), x.size)
    own = {"weights_per_s": rate, "error": weighted_error(out[:CHECKED], qtype, x[:CHECKED], columns)}
    found = peer.measure(x, qtype, columns) if peer else None
    return {"type": ggml.NAME[qtype], "importance": columns is not None, "pymla": own, "peer": found}


def table(records: list[dict[str, Any]], limit: float) -> Table:
    """The records for people; `limit` is in weights per second."""
    made = Table("type", "importance")
    for name in ("error", "of peer", "M weights/s", "of peer", "of copying"):
        made.add_column(name, justify="right")
    for each in records:
        own, peer = each["pymla"], each["peer"]
        cells = [each["type"], "yes" if each["importance"] else "-", f"{own['error']:.3e}"]
        cells.append(f"{own['error'] / peer['error']:.3f}" if peer else "-")
        cells.append(f"{own['weights_per_s'] / 1e6:.0f}")
        cells.append(f"{own['weights_per_s'] / peer['weights_per_s']:.2f}" if peer else "-")
        made.add_row(*cells, f"{own['weights_per_s'] / limit:.0%}")
    return made


def _types(text: str | None) -> list[int]:
    known = {ggml.NAME[qtype]: qtype for qtype in QUANTISERS}
    names = [name.strip().upper() for name in text.split(",")] if text else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: no type that can be written", param_hint="--types")
    return [known[name] for name in names]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--types", metavar="NAME,NAME,…", help="[default: every type that can be written]")
@click.option("--ggml", "llama", type=click.Path(path_type=Path, exists=True), help="llama.cpp's libggml-base.so")
@click.option("--ik", type=click.Path(path_type=Path, exists=True), help="ik_llama.cpp's libggml.so")
@click.option("--rows", default=ROWS, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Also write the records to a file.")
def main(types: str | None, llama: Path | None, ik: Path | None, rows: int, path: Path | None) -> None:
    """Measure the quantisers on this machine."""
    console, x, records = Console(width=None if sys.stdout.isatty() else WIDTH), weights(rows), []
    wanted = _types(types)
    copied = np.empty((len(x), 4 * x.shape[1]), np.uint8)
    with ThreadPoolExecutor(cpu.thread_count()) as pool, console.status("") as status:
        peers = dict.fromkeys(LLAMA_TYPES, Peer(GgmlLibrary(llama), pool)) if llama else {}
        peers |= dict.fromkeys(IK_TYPES, Peer(GgmlLibrary(ik, is_ik=True), pool)) if ik else {}
        limit = rate_of(lambda: quantise(x, ggml.F32, None, copied), x.size)
        for qtype in wanted:
            for columns in (None, importance()):
                status.update(ggml.NAME[qtype])
                records.append(measure(x, qtype, columns, peers.get(ggml.NAME[qtype])))
    console.print(table(records, limit))
    console.print(f"{cpu.thread_count()} threads, {cpu.ISA}; copying: {limit / 1e6:.0f} M weights/s")
    if path:
        about = {"threads": cpu.thread_count(), "isa": cpu.ISA, "copied_per_s": limit, "types": records}
        try:
            outputs.write(path, (json.dumps(about, indent=1) + "\n").encode())
        except PymlaError as error:
            raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
