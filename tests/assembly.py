"""Machine code of the CPU's kernels as text: loops that multiply codes keep everything in registers."""

import re
from collections.abc import Iterable, Iterator

from pymla import ggml
from pymla.cpu.formats import FORMATS
from pymla.cpu.machine import orders
from pymla.cpu.runtime import isa
from pymla.vectors import VECTORS

#: What multiplies bytes, or in attention without VNNI words, at each level.
DOTS = {"amx": "(vpdpbusd|tdpbssd|tdpbusd)", "avx512vnni": "vpdpbusd", "avxvnni": "vpdpbusd", "avx2": "vpmadd(ubsw|wd)"}


def inner_loops(assembly: str) -> Iterator[list[str]]:
    """Bodies of loops without a label in them."""
    for label, body in re.findall(r"^(\.LBB\w+):[^\n]*\n((?:(?!\.LBB\w+:).*\n)*)", assembly, re.MULTILINE):
        lines = body.splitlines()
        jumps = [i for i, line in enumerate(lines) if re.search(rf"\sj\w+\s+{re.escape(label)}$", line)]
        if jumps:
            yield lines[: jumps[-1] + 1]


def check_dot_loops(assembly: str, most: float = 0) -> None:
    """Fail where no loop multiplies codes, or one that does moves vector registers to the stack: more than a share
    `most` of its instructions. Constants may be read from there: types with more of them than there are registers read
    them from memory anyhow."""
    dot = re.compile(rf"\s{DOTS[isa.ISA]}\s")
    loops = [lines for lines in inner_loops(assembly) if sum(bool(dot.search(line)) for line in lines) >= 4]
    assert loops, "no loop has the dot instruction"
    for lines in loops:
        # %rbp is a register as any other here.
        spills = [line for line in lines if re.search(r"\svmov\w+\s+%[xyz]mm\d+, .*\(%rsp\)", line)]
        assert len(spills) <= most * len(lines), "\n".join(lines)


def share_moved(qtypes: Iterable[int]) -> float:
    """The share of instructions that may move registers to the stack in loops for some types. Tables of levels and
    masks of types that are decoded take up registers, and at every level indices of vectors do."""
    quantised = [qtype for qtype in qtypes if qtype in FORMATS]
    is_decoded = any(FORMATS[qtype].order == orders.EIGHTS and qtype != ggml.Q4_0 for qtype in quantised)
    return 0.06 if is_decoded or any(qtype in VECTORS for qtype in quantised) else 0
