"""Speed of every type of tensors on the processor, in one table from one run: ``python bench/type_table.py``.

Every product is compared with the reference before it is timed. In V2-Lite's sizes:

- gemv: a token times copies of 10944 × 2048, more than 512 MiB in all, by turns with the streaming read of as many;
- gemm: 48 tokens, as an expert sees of a prompt of 512, and 512, times 2048 × 2048, beside the rate of products with
  panels that are unpacked already: the higher of what is measured right before and right after.

What shares are stands in `shares`.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "tools")]

import compile_times  # noqa: E402
from compare import relative_error  # noqa: E402
from products import INT8, Product  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shapes import HIDDEN, MATRICES  # noqa: E402
from shares import SECONDS, Passes, round_count, seconds_of  # noqa: E402

from pymla import ggml  # noqa: E402
from pymla.cpu import limits  # noqa: E402
from pymla.errors import PymlaError  # noqa: E402
from pymla.files import outputs  # noqa: E402
from pymla.measure import facts  # noqa: E402

#: Tokens of a prompt of 512 that one expert sees, and all of it.
COLUMNS = (48, 512)
RESULTS = HERE / "results"
#: Multiply-adds of a round of gemm.
ROUND_MACS = 1 << 32
#: Characters of the table where it goes to a file.
WIDTH = 140

_GEMM_COLUMNS = [name for tokens in COLUMNS for name in (f"gemm {tokens} GMAC/s", "of packed")]


def checked(qtype: int, shape: tuple[int, int], tokens: int) -> tuple[Product, float]:
    """A product that computes what the reference does, and its relative error.

    Raises
    ------
    PymlaError
        It computes something else.
    """
    product = Product(qtype, shape, tokens)
    product.run()
    error = max(relative_error(actual, expected) for actual, expected in product.checks())
    if not error < INT8["rtol_max"]:
        raise PymlaError(f"{ggml.NAME[qtype]}, {tokens} tokens: relative error {error:.1e}; nothing wrong is measured")
    return product, error


def gemv(qtype: int, stream: limits.Stream, seconds: float) -> dict[str, float]:
    """GB/s of the fastest round, share of the streaming read, and relative error. A round takes all copies."""
    product, error = checked(qtype, MATRICES["dense up"], 1)

    def run():
        for _ in range(product.copies):
            product.run()

    rounds, passes = [], Passes(stream, product.run)
    for _ in range(round_count(run, seconds)):
        passes.before_round()
        rounds.append(seconds_of(run))
    nbytes = product.copies * product.nbytes
    return {"gb_per_s": nbytes / min(rounds) / 1e9, "read_share": passes.share(nbytes, rounds), "error": error}


def gemm(qtype: int, tokens: int, seconds: float) -> dict[str, float]:
    """GMAC/s of the fastest round, share of the packed rate, and relative error. Rounds are as long as those of the
    packed rate."""
    product, error = checked(qtype, (HIDDEN, HIDDEN), tokens)
    runs = -(-ROUND_MACS // product.macs)

    def run():
        for _ in range(runs):
            product.run()

    packed = limits.packed_rate()
    rate = runs * product.macs / min(seconds_of(run) for _ in range(round_count(run, seconds)))
    packed = max(packed, limits.packed_rate())
    return {"gmac_per_s": rate / 1e9, "packed_share": rate / packed, "error": error}


def measure(qtype: int, stream: limits.Stream, seconds: float, compiles: bool) -> dict[str, Any]:
    """A type's record."""
    record: dict[str, Any] = {
        "type": ggml.NAME[qtype],
        "bits": 8 * ggml.row_bytes(qtype, HIDDEN) / HIDDEN,
        "gemv": gemv(qtype, stream, seconds),
    }
    record |= {f"gemm_{tokens}": gemm(qtype, tokens, seconds) for tokens in COLUMNS}
    if compiles:
        record["compile"] = compile_times.measure("type", ggml.NAME[qtype])
    return record


def table(records: list[dict[str, Any]], title: str) -> Table:
    """The records for people."""
    made = Table("type", title=title)
    for name in ("bits", "gemv GB/s", "of read", *_GEMM_COLUMNS, "error", "compile s", "CPU s"):
        made.add_column(name, justify="right")
    for each in records:
        few, products = each["gemv"], [each[f"gemm_{tokens}"] for tokens in COLUMNS]
        cells = [f"{each['bits']:.2f}", f"{few['gb_per_s']:.1f}", f"{few['read_share']:.0%}"]
        for product in products:
            cells += [f"{product['gmac_per_s']:.0f}", f"{product['packed_share']:.0%}"]
        cells.append(f"{max(product['error'] for product in (few, *products)):.0e}")
        compiled = each.get("compile")
        cells += [f"{compiled[name]:.1f}" for name in ("seconds", "processor_seconds")] if compiled else ["-", "-"]
        made.add_row(each["type"], *cells)
    return made


def _types(text: str | None) -> list[int]:
    names = [name.strip().upper() for name in text.split(",")] if text else [ggml.NAME[each] for each in ggml.SUPPORTED]
    unknown = [name for name in names if ggml.ID.get(name) not in ggml.SUPPORTED]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: no type that runs", param_hint="--types")
    return [ggml.ID[name] for name in names]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--types", metavar="NAME,NAME,…", help="[default: every type that runs]")
@click.option("--quick", is_flag=True, help="A fifth of the time, no compile times; a file only with --json.")
@click.option("--compile-mix", metavar="MIX", help="Only: time to compile what a file of a mix needs, such as q4_k_m.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="[default: bench/results/types-CPU.json]")
def main(types: str | None, quick: bool, compile_mix: str | None, path: Path | None) -> None:
    """Measure the types of tensors on this machine."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        if compile_mix:
            _show_mix(console, compile_mix)
        else:
            _show_table(console, _types(types), quick, path)
    except PymlaError as error:
        raise click.ClickException(str(error)) from None


def _show_mix(console: Console, mix: str) -> None:
    found = compile_times.measure("mix", mix)
    console.print(
        f"what a {mix} file needs, from an empty cache: {found['seconds']:.1f} s, "
        f"{found['processor_seconds']:.1f} s of the processor"
    )


def _show_table(console: Console, wanted: list[int], quick: bool, path: Path | None) -> None:
    stream, about = limits.Stream(), facts.gather(limits.measure())
    if path is None and not quick:
        path = RESULTS / f"types-{re.sub(r'[^a-z0-9]+', '-', about['machine'].lower()).strip('-')}.json"
    records = []
    with console.status("") as status:
        for qtype in wanted:
            status.update(ggml.NAME[qtype])
            records.append(measure(qtype, stream, SECONDS / 5 if quick else SECONDS, compiles=not quick))
    console.print(table(records, facts.describe(about)))
    if path:
        outputs.write(path, (json.dumps(about | {"types": records}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
