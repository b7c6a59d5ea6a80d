"""Block constants of every ggml type: how many weights a block holds and how many bytes it takes.

The numbers come from the gguf package (``gguf.constants.GGML_QUANT_SIZES``), so a type has one definition.
"""

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pymla.errors import PymlaError

NAME = {int(t): t.name for t in GGMLQuantizationType}
ID = {name: qtype for qtype, name in NAME.items()}
BLOCK_SIZE = {int(t): size for t, (size, _) in GGML_QUANT_SIZES.items()}
BLOCK_BYTES = {int(t): nbytes for t, (_, nbytes) in GGML_QUANT_SIZES.items()}

# Plain integers, because kernels branch on them.
F32 = 0
F16 = 1
Q4_0 = 2
Q4_1 = 3
Q8_0 = 8
Q6_K = 14
BF16 = 30

#: Types that both backends run.
SUPPORTED = (F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q6_K)

#: Types whose products are taken on integers, with activations quantised to int8. The others multiply in float32.
QUANTISED = (Q4_0, Q4_1, Q8_0, Q6_K)


def row_bytes(qtype: int, columns: int) -> int:
    """Bytes of a row of `columns` weights.

    Raises
    ------
    PymlaError
        `columns` is not a multiple of the type's block.
    """
    if columns % BLOCK_SIZE[qtype]:
        raise PymlaError(f"{columns} columns are no multiple of {NAME[qtype]}'s block of {BLOCK_SIZE[qtype]}")
    return columns // BLOCK_SIZE[qtype] * BLOCK_BYTES[qtype]
