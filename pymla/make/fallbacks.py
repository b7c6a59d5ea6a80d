"""The type that a matrix gets where the wanted type does not fit its rows."""

from collections.abc import Sequence

from pymla import ggml

#: Types that llama.cpp (``tensor_type_fallback`` in src/llama-quant.cpp) and, for types of its own, ik_llama.cpp
#: (``change_type_if_necessary`` in src/llama-quantize.cpp) write where rows are no multiple of 256 or 64 weights.
_FALLBACKS = {
    **dict.fromkeys((ggml.Q2_0, ggml.Q2_K, ggml.Q3_K, ggml.TQ1_0, ggml.TQ2_0), ggml.Q4_0),
    **dict.fromkeys((ggml.Q4_K, ggml.IQ4_K, ggml.IQ5_KS), ggml.Q5_0),
    ggml.Q5_K: ggml.Q5_1,
    ggml.IQ5_K: ggml.Q6_0,
    **dict.fromkeys((ggml.IQ1_S, ggml.IQ1_M, ggml.IQ2_XXS, ggml.IQ2_XS, ggml.IQ2_S, ggml.IQ3_XXS), ggml.IQ4_NL),
    **dict.fromkeys((ggml.IQ3_S, ggml.IQ4_XS, ggml.IQ2_K, ggml.IQ3_K, ggml.IQ2_KS, ggml.IQ3_KS), ggml.IQ4_NL),
    **dict.fromkeys((ggml.IQ4_KS, ggml.IQ4_KSS, ggml.IQ2_KL), ggml.IQ4_NL),
    **dict.fromkeys((ggml.IQ1_KT, ggml.IQ2_KT, ggml.IQ3_KT, ggml.IQ4_KT), ggml.IQ4_NL),
}


def rows_apart(qtype: int) -> int:
    """The type of files nearest to an interleaved one, and any other type itself."""
    plain = ggml.plain_type(qtype)
    return ggml.IQ1_M if plain == ggml.IQ1_M_R1 else plain


def fitting_type(qtype: int, shape: Sequence[int]) -> int:
    """`qtype`, or the type that llama.cpp and ik_llama.cpp fall back to where it does not fit a matrix.

    Where rows are no multiple of those that lie together, that is the plain type; where columns are no multiple of the
    block, another type with a smaller block; F16 where no block divides them.

    Parameters
    ----------
    shape : in NumPy order, columns last

    >>> ggml.NAME[fitting_type(ggml.Q4_K, (2048, 1408))]
    'Q5_0'
    """
    rows = shape[-2] if len(shape) > 1 else 1
    if rows % ggml.ROWS_TOGETHER[qtype] or shape[-1] % ggml.BLOCK_SIZE[qtype]:
        qtype = rows_apart(qtype)
    for candidate in (qtype, _FALLBACKS.get(qtype, ggml.Q8_0)):
        if shape[-1] % ggml.BLOCK_SIZE[candidate] == 0:
            return candidate
    return ggml.F16
