"""Sizes of files as options."""

import re

import click

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d{1,15}(\.\d{1,6})?)\s*(?P<unit>[KMGT]I?)?B?", re.ASCII)


class Size(click.ParamType):
    """A number of bytes: 40G is 40 · 10⁹, as llama.cpp's tools take it, 40GiB is 40 · 2³⁰."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(str(value).strip().upper())
        if found is None:
            self.fail(f"{value!r:.40} is no size; write 40G, 500M or 40GiB", param, ctx)
        nbytes = int(float(found["number"]) * (_UNITS | _BINARY)[found["unit"] or ""])
        if not nbytes:
            self.fail(f"{value!r:.40} is no size: a byte is the least", param, ctx)
        return nbytes


#: The option's type.
SIZE = Size()
