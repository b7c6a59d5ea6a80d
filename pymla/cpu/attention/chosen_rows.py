"""Rows of the cache at the positions that a token chose: where they lie, prefetching, and copies as a page."""

from typing import NamedTuple

from pymla.cpu.attention.next_page import LINE
from pymla.cpu.machine.simd import address, load_i8x32, load_i16, prefetch_l2, store_i8x32, store_i16
from pymla.cpu.runtime.compiling import helper
from pymla.pages import PAGE


class Rows(NamedTuple):
    """Where rows of a cache lie: a page has the codes of its rows first, and then their scales."""

    pages: int  # address of the cache
    code_bytes: int  # of a row
    scale_bytes: int  # of a row; 0 where scales lie between codes, as in ggml's blocks


@helper
def rows_of_cache(cache, code_bytes):
    """`Rows` of a cache whose rows have so many bytes of codes, or all of them."""
    return Rows(address(cache.data), code_bytes, cache.data.shape[1] - code_bytes)


@helper
def count_chosen(chosen):
    """How many positions there are before the first -1."""
    low, high = 0, len(chosen)
    while low < high:
        middle = (low + high) // 2
        if chosen[middle] < 0:
            high = middle
        else:
            low = middle + 1
    return low


@helper
def slot_of(position, table):
    """The slot of a position of a sequence with a block table."""
    return table[position // PAGE] * PAGE + position % PAGE


@helper
def prefetch_share(chosen, share, shares, table, latent, rope):
    """Prefetch one of `shares` shares of the rows of the first `PAGE` positions, of two caches."""
    for i in range(PAGE * share // shares, min(PAGE * (share + 1) // shares, len(chosen))):
        slot = slot_of(chosen[i], table)
        _prefetch_row(latent, slot)
        _prefetch_row(rope, slot)


@helper
def _prefetch_row(rows, slot):
    codes, scales = _row(rows, slot)
    for at in range(0, rows.code_bytes, LINE):
        prefetch_l2(codes + at)
    if rows.scale_bytes > 0:
        prefetch_l2(scales)


@helper
def gather_rows(chosen, table, rows, page):
    """Copy the rows of some positions, `PAGE` at most, to the address of a page."""
    behind = PAGE * rows.code_bytes
    for i in range(len(chosen)):
        codes, scales = _row(rows, slot_of(chosen[i], table))
        _copy(codes, page + rows.code_bytes * i, rows.code_bytes)
        _copy(scales, page + behind + rows.scale_bytes * i, rows.scale_bytes)


@helper
def _row(rows, slot):
    """Addresses of the codes and the scales of the row in a slot."""
    page = rows.pages + slot // PAGE * PAGE * (rows.code_bytes + rows.scale_bytes)
    scales = page + PAGE * rows.code_bytes
    return page + slot % PAGE * rows.code_bytes, scales + slot % PAGE * rows.scale_bytes


@helper
def _copy(source, target, nbytes):
    """Copy an even number of bytes from one address to another."""
    whole = nbytes // 32 * 32
    for i in range(0, whole, 32):
        store_i8x32(target + i, load_i8x32(source + i))
    for i in range(whole, nbytes, 2):
        store_i16(target + i, load_i16(source + i))
