"""The sweep as a table for people, as CSV and as plain types."""

import csv
from collections.abc import Iterable
from typing import Any, TextIO

from pymla.backend import Rates
from pymla.measure.sweep import Row

#: Columns of ``llama-sweep-bench``, and further columns of this table.
PEER_COLUMNS = ("PP", "TG", "N_KV", "T_PP s", "S_PP t/s", "T_TG s", "S_TG t/s")
COLUMNS = (*PEER_COLUMNS, "PP share", "TG share", "cache MiB")
_WIDTHS = (6, 6, 6, 8, 8, 8, 8, 8, 8, 9)


def header() -> str:
    """The table's first two lines."""
    names = (f"{name:>{width}}" for name, width in zip(COLUMNS, _WIDTHS, strict=True))
    rules = "|".join("-" * (width + 1 + (i > 0)) for i, width in enumerate(_WIDTHS))
    return f"|{' | '.join(names)} |\n|{rules}|"


def cells(row: Row, limits: Rates) -> tuple[int | float | None, ...]:
    """Values in the order of `COLUMNS`; None where nothing was measured."""
    mib = row.cache_bytes / (1 << 20)
    return (row.pp, row.tg, row.n_kv, row.t_pp, row.s_pp, row.t_tg, row.s_tg, *row.shares(limits), mib)


def line(row: Row, limits: Rates) -> str:
    """A row of the table; a dash where nothing was measured."""
    formats = ("d", "d", "d", ".3f", ".2f", ".3f", ".2f", ".1%", ".1%", ".2f")
    texts = (
        f"{'-' if value is None else format(value, spec):>{width}}"
        for value, spec, width in zip(cells(row, limits), formats, _WIDTHS, strict=True)
    )
    return f"|{' | '.join(texts)} |"


def report(rows: Iterable[Row], limits: Rates, about: dict[str, Any]) -> dict[str, Any]:
    """The run as plain types, for JSON."""
    return {**about, "rows": [_record(row, limits) for row in rows]}


def _record(row: Row, limits: Rates) -> dict[str, Any]:
    pp_share, tg_share = row.shares(limits)
    return {
        "model": row.model,
        "mla": row.mla,
        "dsa": row.dsa,
        "cache_type": row.cache_type,
        "device": row.device,
        "threads": row.threads,
        "pp": row.pp,
        "tg": row.tg,
        "n_kv": row.n_kv,
        "t_pp": row.t_pp,
        "s_pp": row.s_pp,
        "t_tg": row.t_tg,
        "s_tg": row.s_tg,
        "pp_share": pp_share,
        "tg_share": tg_share,
        "cache_bytes": row.cache_bytes,
        "pp_seconds": list(row.pp_seconds),
        "tg_seconds": list(row.tg_seconds),
    }


def write_csv(stream: TextIO, rows: Iterable[Row], limits: Rates) -> None:
    """The table with unrounded values, and with columns for the model, the variant and the device of each row."""
    writer = csv.writer(stream)
    writer.writerow(("model", "mla", "cache type", "device", "threads", *COLUMNS))
    for row in rows:
        values = ("" if value is None else value for value in cells(row, limits))
        writer.writerow((row.model, row.mla, row.cache_type, row.device, row.threads, *values))
