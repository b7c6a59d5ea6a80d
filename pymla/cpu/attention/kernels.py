"""The kernels that a model launches for attention, by the types of its cache and of ``W_k_b`` and ``W_v_b``."""

from __future__ import annotations

from pymla.cpu.attention import absorbed_form, expanded_form, full_form, indexer, materialised_form, sparse_form
from pymla.cpu.attention.cache_rows import load_kernels, store_kernels
from pymla.cpu.quant import matmul_heads_kernels
from pymla.cpu.runtime.jit import Kernel


def full_kernels(keys: int, values: int, k_b: int, v_b: int) -> list[Kernel]:
    """Of ``--mla 0``, whose keys and values are expanded as they are stored."""
    expanding = expanded_form.expand_kernels(k_b, v_b, exact=True)
    return [*store_kernels(keys, values), *full_form.kernels(keys, values), *expanding]


def absorbed_kernels(latent: int, rope: int, k_b: int, v_b: int, materialised: bool = False) -> list[Kernel]:
    """Of the absorbed form, with its queries and results."""
    form = materialised_form if materialised else absorbed_form
    around = [*store_kernels(latent, rope), *absorbed_form.absorb_kernels(k_b), *matmul_heads_kernels(v_b)]
    return [*around, *form.kernels(latent, rope)]


def expanded_kernels(latent: int, rope: int, k_b: int, v_b: int, exact: bool) -> list[Kernel]:
    """Of the expanded form."""
    rows = [*store_kernels(latent, rope), *load_kernels(latent, rope)]
    return [*rows, *expanded_form.expand_kernels(k_b, v_b, exact), *expanded_form.kernels(exact)]


def choose_kernels(keys: int) -> list[Kernel]:
    """Of the indexer, with its cache of a type."""
    return [*store_kernels(keys), *indexer.kernels(keys)]


def sparse_kernels(latent: int, rope: int) -> list[Kernel]:
    """Of the absorbed form over chosen positions, but for its queries and results, which are those of
    `absorbed_kernels`."""
    return sparse_form.kernels(latent, rope)
