"""Types of the rows of a latent cache, beside ggml's (`pymla.cpu.attention.cache_rows`)."""

from pymla import ggml

#: Types of rows, beside ggml's: the numbers of Q8_0 with codes 128 more than there, and int16 with a scale for a row.
Q8_PAGES, I16_PAGES = 1000 + ggml.Q8_0, 1016

#: Bytes of a row of these types, by its numbers.
ROW_BYTES = {
    Q8_PAGES: lambda width: ggml.row_bytes(ggml.Q8_0, width),
    I16_PAGES: lambda width: 2 * (width + width % 2) + 4,
}
