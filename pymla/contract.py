"""The contract of each operation of `pymla.backend`, checked before a kernel sees an address.

A method has the name and the arguments of its operation, is called by it in every backend, and raises a PymlaError that
names the operation, the argument, what it is and what it must be. Shapes are compared with each other, types and rows
of blocks with `pymla.ggml`. Values of indices (tokens, experts, positions, slots, pages) are compared with what they
index where they lie in the host's memory and are known: not on a GPU, whose kernels bound them, and not while a step is
recorded, whose indices come from `pymla.engine.cache` with every replay.

Checks run in Python, so they cost a recorded step nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pymla import ggml
from pymla.argument_checks import INT32, UINT8, Abilities, Call, Dtypes
from pymla.backend import Array, KeysValues, MatrixInput
from pymla.pages import HADAMARD_TYPES, PAGE, Step, pages_of
from pymla.tensor import QTensor

if TYPE_CHECKING:
    from pymla.models.config import ModelConfig

#: Dtypes in which fast backends compute; the reference also takes float64.
FLOAT32: Dtypes = (np.dtype(np.float32),)
FLOAT16: Dtypes = (np.dtype(np.float16),)
FLOAT64: Dtypes = (np.dtype(np.float64),)
FLOATS = FLOAT32 + FLOAT64

#: S, H, numbers of a key and numbers of a value, of expanded keys and values.
Sizes = tuple[int, int, int, int]


class Contract:
    """The contracts on one backend.

    Parameters
    ----------
    floats : tuple of dtype
        Of float arrays.
    contiguous : bool
        Whether arrays must be contiguous where a kernel goes through them by address.
    known : callable(), optional
        Whether values of indices can be looked at now; never by default.
    pages : dict of int and callable(width), optional
        Types of the cache beside ggml's, which lie page by page, and the bytes of a row.
    expanded_floats : tuple of dtype, optional
        Of expanded keys and values, where they differ.
    """

    def __init__(
        self,
        floats: Dtypes = FLOAT32,
        contiguous: bool = True,
        known: Callable[[], bool] | None = None,
        pages: Mapping[int, Callable[[int], int]] | None = None,
        expanded_floats: Dtypes | None = None,
    ):
        self._abilities = Abilities(floats, expanded_floats or floats, contiguous, known or _never, pages or {})

    def _call(self, operation: str) -> Call:
        return Call(operation, self._abilities)

    # Matrices --------------------------------------------------------------------------------------------------------

    def activation(self, x: Array) -> None:
        self._call("Activation").float("x", x, (None, None), contiguous=True)

    def matmul(self, w: QTensor, activation: MatrixInput, out: Array) -> None:
        call = self._call("matmul")
        tokens, columns = call.activation(activation)
        *matrices, rows = call.matrices("w", w, (None, None, columns))
        call.float("out", out, (tokens, rows * (matrices[0] if matrices else 1)), contiguous=True)

    def matmul_heads(self, w: QTensor, x: Array, out: Array) -> None:
        call = self._call("matmul_heads")
        call.float("x", x, (None, None, None), contiguous=True)
        tokens, heads, columns = x.shape
        _, rows = call.matrices("w", w, (heads, None, columns))
        call.float("out", out, (tokens, heads, rows), contiguous=True)

    def matmul_heads_transposed(self, w: QTensor, x: Array, out: Array) -> None:
        call = self._call("matmul_heads_transposed")
        call.float("x", x, (None, None, None), rows=True)
        tokens, heads, rows = x.shape
        call.float("out", out, (tokens, heads, None), rows=True)
        call.matrices("w", w, (heads, rows, out.shape[2]))

    def embedding_rows(self, w: QTensor, tokens: Array, scale: float, out: Array) -> None:
        call = self._call("embedding_rows")
        call.float("out", out, (None, None), contiguous=True)
        rows = call.single("w", w, None, out.shape[1])
        call.array("w", w.data, UINT8, (None, None), contiguous=True)
        call.index("tokens", tokens, (len(out),), rows, "rows of w")

    # Norms and rope --------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        call = self._call("rms_norm")
        call.float("out", out, (None, None), rows=True)
        call.float("x", x, out.shape, rows=True)
        call.array("weight", weight, FLOAT32, (out.shape[1],), contiguous=True)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float, out: Array) -> None:
        call = self._call("layer_norm")
        call.float("out", out, (None, None), contiguous=True)
        call.float("x", x, out.shape, rows=True)
        call.array("weight", weight, FLOAT32, (out.shape[1],), contiguous=True)
        call.array("bias", bias, FLOAT32, (out.shape[1],), contiguous=True)

    def normed(self, x: Array, weight: Array, eps: float, out: Array, y: Array | None = None) -> None:
        call = self._call("normed")
        call.float("x", x, (None, None), contiguous=True)
        call.float("out", out, x.shape, contiguous=True)
        call.array("weight", weight, FLOAT32, (x.shape[1],), contiguous=True)
        if y is not None:
            call.float("y", y, x.shape, contiguous=True)

    def add(self, x: Array, y: Array) -> None:
        call = self._call("add")
        call.float("x", x, (None, None), contiguous=True)
        call.float("y", y, x.shape, contiguous=True)

    def angles(self, positions: Array, inv_freq: Array, magnitude: float, out: Array) -> None:
        call = self._call("angles")
        call.array("positions", positions, INT32, (None,), contiguous=True)
        call.array("inv_freq", inv_freq, FLOAT64, (None,), contiguous=True)
        call.float("out", out, (len(positions), len(inv_freq), 2), contiguous=True)

    def rope_interleaved(self, x: Array, cos_sin: Array) -> None:
        self._rope("rope_interleaved", x, cos_sin)

    def rope_neox(self, x: Array, cos_sin: Array) -> None:
        self._rope("rope_neox", x, cos_sin)

    def _rope(self, operation: str, x: Array, cos_sin: Array) -> None:
        call = self._call(operation)
        call.float("x", x, (None, None, None))
        call.float("cos_sin", cos_sin, (len(x), None, 2))
        if 2 * cos_sin.shape[1] > x.shape[2]:
            call.refuse("cos_sin", f"of {cos_sin.shape[1]} pairs", f"at most {x.shape[2] // 2}")

    def temper(self, x: Array, positions: Array, scale: float, length: int) -> None:
        call = self._call("temper")
        call.float("x", x, (None, None, None), contiguous=True)
        call.index("positions", positions, (len(x),), 1 << 31, "positions")
        if length < 1:
            call.refuse("length", str(length), "a number from 1 on")

    # Experts ---------------------------------------------------------------------------------------------------------

    def router(self, logits: Array, bias: Array | None, config: ModelConfig, ids: Array, weights: Array) -> None:
        call = self._call("router")
        call.float("logits", logits, (None, None), contiguous=True)
        tokens, experts = logits.shape
        if bias is not None:
            call.array("bias", bias, FLOAT32, (experts,), contiguous=True)
        call.array("ids", ids, INT32, (tokens, None), contiguous=True)
        call.float("weights", weights, ids.shape, contiguous=True)
        groups, kept, used = config.n_group, config.topk_group, ids.shape[1]
        if not (1 <= groups <= experts and experts % groups == 0 and 1 <= kept <= groups):
            got = f"{groups}, with topk_group {kept},"
            call.refuse("n_group", got, f"a divisor of {experts} experts, with 1 to as many groups kept,")
        if not 1 <= used <= experts // groups * kept:
            call.refuse("ids", f"of {used} experts a token", f"1 to {experts // groups * kept}")

    def experts(
        self,
        activation: MatrixInput,
        ids: Array,
        weights: Array,
        gate: QTensor,
        up: QTensor,
        down: QTensor,
        out: Array,
        shared: tuple[QTensor, QTensor, QTensor] | None = None,
        add: bool = False,
    ) -> None:
        call = self._call("experts")
        tokens, columns = call.activation(activation)
        count, inner = call.stack("gate", gate, None, columns)
        call.matrices("up", up, (count, inner, columns))
        call.matrices("down", down, (count, columns, inner))
        call.index("ids", ids, (tokens, None), count, "experts")
        call.float("weights", weights, ids.shape, contiguous=True)
        call.float("out", out, (tokens, columns), contiguous=True)
        if shared is not None:
            rows = call.single("shared gate", shared[0], None, columns)
            call.single("shared up", shared[1], rows, columns)
            call.single("shared down", shared[2], columns, rows)
            if rows % inner:
                call.refuse("shared gate", f"of {rows} rows", f"a multiple of the experts' {inner}")

    def ffn(
        self, activation: MatrixInput, gate: QTensor, up: QTensor, down: QTensor, out: Array, add: bool = False
    ) -> None:
        call = self._call("ffn")
        tokens, columns = call.activation(activation)
        rows = call.single("gate", gate, None, columns)
        call.single("up", up, rows, columns)
        call.single("down", down, columns, rows)
        call.float("out", out, (tokens, columns), contiguous=True)

    def relu_squared(self, x: Array) -> None:
        self._call("relu_squared").float("x", x, (None, None), contiguous=True)

    # The cache, and attention over it --------------------------------------------------------------------------------

    def store(self, rows: Array, slots: Array, cache: QTensor, floats: Dtypes | None = None) -> None:
        """`floats` are the dtypes of `rows`, where the backend stores more dtypes than it computes in."""
        call = self._call("store")
        call.array("rows", rows, floats or self._abilities.floats, (None, None), rows=True)
        count = call.cache("cache", cache, rows.shape[1])
        call.index("slots", slots, (len(rows),), count, "slots of the cache")

    def load(self, cache: QTensor, block_table: Array, out: Array) -> None:
        call = self._call("load")
        call.float("out", out, (None, None), contiguous=True)
        slots = call.cache("cache", cache, out.shape[1])
        call.array("block_table", block_table, INT32, (None,), contiguous=True)
        pages = pages_of(len(out))
        if pages > len(block_table):
            most = PAGE * len(block_table)
            call.refuse("out", f"of {len(out)} rows", f"at most {most}, what the pages of block_table hold,")
        if self._abilities.known():
            call.within("block_table", block_table[:pages], slots // PAGE, "pages of the cache")

    def absorb(self, q: Array, k_b: QTensor, out: Array) -> None:
        call = self._call("absorb")
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("out", out, (*q.shape[:2], None), contiguous=True)
        _, nope = call.several("k_b", k_b)
        rope = q.shape[2] - nope
        if not 0 <= rope < out.shape[2]:
            wanted = f"k_b's {nope} and at most {out.shape[2] - 1} rotated ones"
            call.refuse("q", f"of {q.shape[2]} numbers", wanted)
        call.matrices("k_b", k_b, (q.shape[1], nope, out.shape[2] - rope))

    def absorbed(
        self,
        q: Array,
        latent: QTensor,
        rope: QTensor,
        step: Step,
        scale: float,
        out: Array,
        operation: str = "absorbed",
    ) -> None:
        """Also of `absorbed_materialised` and `sparse`, which `operation` then says."""
        call = self._call(operation)
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("out", out, (*q.shape[:2], None), rows=True)
        rank, rotated = out.shape[2], q.shape[2] - out.shape[2]
        if rotated < 1 or rank < 1:
            call.refuse("out", f"of {rank} numbers a head", f"fewer than the {q.shape[2]} of q")
        slots = call.cache("latent", latent, rank)
        if call.cache("rope", rope, rotated) != slots:
            call.refuse("rope", f"of {len(rope.data)} slots", f"as many as latent has, {slots},")
        call.step(step, len(q), slots)

    def choose(self, q: Array, weights: Array, keys: QTensor, step: Step, out: Array) -> None:
        call = self._call("choose")
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("weights", weights, q.shape[:2], contiguous=True)
        if q.shape[2] < 1 or q.shape[2] % 32:
            call.refuse("q", f"of {q.shape[2]} numbers a head", "a multiple of 32")
        slots = call.cache("keys", keys, q.shape[2])
        call.array("out", out, INT32, (len(q), None), contiguous=True)
        if out.shape[1] < 1:
            call.refuse("out", "of no positions", "one position at least")
        call.step(step, len(q), slots)

    def sparse(
        self, q: Array, latent: QTensor, rope: QTensor, step: Step, chosen: Array, scale: float, out: Array
    ) -> None:
        self.absorbed(q, latent, rope, step, scale, out, "sparse")
        call = self._call("sparse")
        call.array("chosen", chosen, INT32, (len(q), None), contiguous=True)
        if chosen.shape[1] < 1:
            call.refuse("chosen", "of no positions", "one position at least")
        if self._abilities.known():
            call.chosen(step, chosen)

    def full(self, q: Array, keys: QTensor, values: QTensor, step: Step, scale: float, out: Array) -> None:
        call = self._call("full")
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("out", out, (*q.shape[:2], None), rows=True)
        slots = call.cache("keys", keys, q.shape[1] * q.shape[2])
        if call.cache("values", values, out.shape[1] * out.shape[2]) != slots:
            call.refuse("values", f"of {len(values.data)} slots", f"as many as keys have, {slots},")
        for name, cache, width in (("keys", keys, q.shape[2]), ("values", values, out.shape[2])):
            block = ggml.BLOCK_SIZE.get(cache.qtype)
            # Rows that lie page by page have no blocks of a head, and mixed ones are latent.
            if block is None or width % block or cache.qtype in HADAMARD_TYPES:
                kind = ggml.NAME.get(cache.qtype, f"of type {cache.qtype}")
                call.refuse(name, kind, f"a type whose blocks divide a head's {width} numbers")
        call.step(step, len(q), slots)

    def sizes(self, operation: str, keys_values: KeysValues) -> Sizes:
        """The sizes of expanded keys (S, H, D) and values (S, H, v), after their dtypes and shapes were checked."""
        call = self._call(operation)
        keys: Array = getattr(keys_values, "keys", None)
        values: Array = getattr(keys_values, "values", None)
        call.array("keys", keys, self._abilities.expanded_floats, (None, None, None), contiguous=True)
        length, heads, size = keys.shape
        call.array("values", values, self._abilities.expanded_floats, (length, heads, None), contiguous=True)
        return length, heads, size, values.shape[2]

    def expand(
        self, c_kv: Array, k_pe: Array, k_b: QTensor, v_b: QTensor, sizes: Sizes, rotated: int | None = None
    ) -> None:
        """`sizes` are those of the keys and values to be made; `rotated` the rotated numbers of a key, where it has a
        place of their own for them."""
        call = self._call("expand")
        length, heads, size, v = sizes
        call.float("c_kv", c_kv, (length, None), contiguous=True)
        _, nope = call.several("k_b", k_b)
        call.float("k_pe", k_pe, (length, None), rows=True)
        call.matrices("k_b", k_b, (heads, nope, c_kv.shape[1]))
        call.matrices("v_b", v_b, (heads, v, c_kv.shape[1]))
        if nope + k_pe.shape[1] != size:
            wanted = f"{size - nope}, what keys have beside k_b's {nope},"
            call.refuse("k_pe", f"of {k_pe.shape[1]} numbers", wanted)
        if rotated not in (None, k_pe.shape[1]):
            call.refuse("k_pe", f"of {k_pe.shape[1]} numbers", f"{rotated}, as `keys_values` was told,")

    def expanded(self, q: Array, sizes: Sizes, positions: Array, out: Array) -> None:
        """`sizes` are those of the keys and values."""
        call = self._call("expanded")
        length, heads, size, v = sizes
        call.float("q", q, (None, heads, size), contiguous=True)
        call.float("out", out, (len(q), heads, v), rows=True)
        call.index("positions", positions, (len(q),), length, "positions of the keys")


def _never() -> bool:
    return False
