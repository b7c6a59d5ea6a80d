"""Random numbers of a counter: Philox4x32-10 (Salmon et al., 2011)."""

from pymla.cuda.runtime.jit import device
from pymla.cuda.sampling.rows import WORD


@device
def philox(seed, draw):
    """A random number below 2 ** 32: the first word of Philox4x32-10."""
    key0, key1 = seed & WORD, seed >> 32 & WORD
    c0, c1, c2, c3 = draw & WORD, draw >> 32 & WORD, 0, 0
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 ^ c1 ^ key0) & WORD,
            product1 & WORD,
            (product0 >> 32 ^ c3 ^ key1) & WORD,
            product0 & WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & WORD, key1 + 0xBB67AE85 & WORD
    return c0
