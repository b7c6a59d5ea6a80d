"""Tables on standard output, for people."""

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class Page:
    """Tables, one below the other. Names and values come from files, so markup in them is printed as it stands."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)

    def table(self, title: str, *columns: str, rows: Sequence[tuple[Any, ...]], numbers: tuple[int, ...] = ()) -> None:
        """Print a table. Columns whose index is in `numbers` are aligned to the right; no columns, no header."""
        width = len(rows[0])
        table = Table(box=box.SIMPLE_HEAD if columns else None, show_header=bool(columns), show_edge=False)
        for index in range(width):
            right = index in numbers
            table.add_column(
                columns[index] if columns else "",
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
        self.console.print(Text(f"\n{title}", style="bold"))
        self.console.print(Padding(table, (0, 0, 0, 1), expand=False))

    def lines(self, title: str, rows: Sequence[tuple[str, ...]]) -> None:
        """Print a table that may be wider than the page: a row is one line."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        self.console.print(Text(f"\n{title}", style="bold"))
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.console.print(Text(f" {'  '.join(cells)}".rstrip()), soft_wrap=True)

    def warn(self, message: str) -> None:
        self.console.print(Text(message, style="bold red"))
