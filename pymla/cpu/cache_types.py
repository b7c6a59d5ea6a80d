"""Types of the rows of a cache, beside ggml's (`pymla.cpu.attention.cache_rows`)."""

from pymla.pages import CACHE_TYPES

#: Types of rows, beside ggml's: int16 with a scale for a row; the numbers of ggml's types of a cache; and int8 with a
#: scale for a row, which an indexer's keys have (`pymla.cpu.attention.index_keys`).
I16_PAGES = 1016
I8_PAGES = 1024
Q8_PAGES, Q6_PAGES, Q5_PAGES, Q4_PAGES = (1000 + CACHE_TYPES[name] for name in ("q8_0", "q6_0", "q5_0", "q4_0"))

#: Bits of the codes of these types, of which 32 have a scale. Those with fewer than 8 are mixed
#: (`pymla.pages.HADAMARD_TYPES`).
CODE_BITS = {Q8_PAGES: 8, Q6_PAGES: 6, Q5_PAGES: 5, Q4_PAGES: 4}
#: The types by those of ggml that have the same numbers.
PAGES_OF = {qtype - 1000: qtype for qtype in CODE_BITS}


def _code_bytes(bits):
    return lambda width: width * bits // 8


def _row_bytes(bits):
    return lambda width: _code_bytes(bits)(width) + width // 32 * 2


#: Bytes of the codes of a row of these types, by its numbers. In a page, the codes of all rows come before all scales.
CODE_BYTES = {qtype: _code_bytes(bits) for qtype, bits in CODE_BITS.items()}
CODE_BYTES[I16_PAGES] = lambda width: 2 * (width + width % 2)

#: Bytes of a row of these types, by its numbers.
ROW_BYTES = {qtype: _row_bytes(bits) for qtype, bits in CODE_BITS.items()}
ROW_BYTES[I16_PAGES] = lambda width: CODE_BYTES[I16_PAGES](width) + 4
ROW_BYTES[I8_PAGES] = lambda width: width + 4
