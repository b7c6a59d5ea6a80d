"""What the operations of a backend take: checks that come before a kernel sees an address.

Each function has the name and the arguments of an operation, is called by it in every backend, and raises a PymlaError
that names the operation, the argument, what it is and what it must be. Shapes are compared with each other, types and
rows of blocks with what the type says. Values of indices (tokens, experts, positions, slots, pages) are compared with
what they index where they lie in the host's memory and are known: not while a step is recorded, whose indices come from
`pymla.engine.cache` with every replay, and not on a GPU.

Checks run in Python, so they cost a recorded step nothing.
"""

import numpy as np

from pymla import ggml
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES, PAGE

#: What fast backends compute in; the reference also takes float64.
FLOAT32 = (np.dtype(np.float32),)
FLOAT16 = (np.dtype(np.float16),)
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
INT32 = (np.dtype(np.int32),)
_UINT8 = (np.dtype(np.uint8),)


class Contract:
    """The checks of a backend, with what it can take beyond what an operation means.

    Parameters
    ----------
    floats : tuple of dtype
        Types of float arrays.
    expanded_floats : tuple of dtype, optional
        Types of expanded keys and values, where they differ.
    contiguous : bool
        Whether arrays must be contiguous where a kernel goes through them by address.
    known : callable(), optional
        Whether values of indices can be looked at now; never by default.
    pages : dict of int and callable(width), optional
        Types of the cache beside ggml's, which lie page by page, and the bytes of a row.
    """

    def __init__(self, floats=FLOAT32, contiguous=True, known=None, pages=None, expanded_floats=None):
        self.floats, self.contiguous, self.known, self.pages = floats, contiguous, known, pages or {}
        self.expanded_floats = expanded_floats or floats

    # Matrices --------------------------------------------------------------------------------------------------------

    def activation(self, x):
        """The input of matrices."""
        call = _Call(self, "Activation")
        call.float("x", x, (None, None), contiguous=True)

    def matmul(self, w, activation, out):
        call = _Call(self, "matmul")
        tokens, columns = call.activation(activation)
        *matrices, rows = call.matrices("w", w, (None, None, columns))
        call.float("out", out, (tokens, rows * (matrices[0] if matrices else 1)), contiguous=True)

    def matmul_heads(self, w, x, out):
        call = _Call(self, "matmul_heads")
        call.float("x", x, (None, None, None), contiguous=True)
        tokens, heads, columns = x.shape
        _, rows = call.matrices("w", w, (heads, None, columns))
        call.float("out", out, (tokens, heads, rows), contiguous=True)

    def matmul_heads_transposed(self, w, x, out):
        call = _Call(self, "matmul_heads_transposed")
        call.float("x", x, (None, None, None), rows=True)
        tokens, heads, rows = x.shape
        call.float("out", out, (tokens, heads, None), rows=True)
        call.matrices("w", w, (heads, rows, out.shape[2]))

    def embedding_rows(self, w, tokens, out):
        call = _Call(self, "embedding_rows")
        call.float("out", out, (None, None), contiguous=True)
        (rows,) = call.single("w", w, (None, out.shape[1]))
        call.array("w", w.data, _UINT8, (None, None), contiguous=True)
        call.index("tokens", tokens, (len(out),), rows, "rows of w")

    # Norms and rope --------------------------------------------------------------------------------------------------

    def rms_norm(self, x, weight, eps, out):
        call = _Call(self, "rms_norm")
        call.float("out", out, (None, None), contiguous=True)
        call.float("x", x, out.shape, rows=True)
        call.array("weight", weight, FLOAT32, (out.shape[1],), contiguous=True)

    def normed(self, x, weight, eps, out, y=None):
        call = _Call(self, "normed")
        call.float("x", x, (None, None), contiguous=True)
        call.float("out", out, x.shape, contiguous=True)
        call.array("weight", weight, FLOAT32, (x.shape[1],), contiguous=True)
        if y is not None:
            call.float("y", y, x.shape, contiguous=True)

    def add(self, x, y):
        call = _Call(self, "add")
        call.float("x", x, (None, None), contiguous=True)
        call.float("y", y, x.shape, contiguous=True)

    def angles(self, positions, inv_freq, magnitude, out):
        call = _Call(self, "angles")
        call.array("positions", positions, INT32, (None,), contiguous=True)
        call.array("inv_freq", inv_freq, FLOATS[1:], (None,), contiguous=True)
        call.float("out", out, (len(positions), len(inv_freq), 2), contiguous=True)

    def rope_interleaved(self, x, cos_sin):
        call = _Call(self, "rope_interleaved")
        call.float("x", x, (None, None, None))
        call.float("cos_sin", cos_sin, (len(x), None, 2))
        if 2 * cos_sin.shape[1] > x.shape[2]:
            call.refuse("cos_sin", f"of {cos_sin.shape[1]} pairs", f"at most {x.shape[2] // 2}")

    # Experts ---------------------------------------------------------------------------------------------------------

    def router(self, logits, bias, config, ids, weights):
        call = _Call(self, "router")
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

    def experts(self, activation, ids, weights, gate, up, down, out, shared=None, add=False):
        call = _Call(self, "experts")
        tokens, columns = call.activation(activation)
        count, inner = call.stack("gate", gate, (None, columns))
        call.matrices("up", up, (count, inner, columns))
        call.matrices("down", down, (count, columns, inner))
        call.index("ids", ids, (tokens, None), count, "experts")
        call.float("weights", weights, ids.shape, contiguous=True)
        call.float("out", out, (tokens, columns), contiguous=True)
        if shared is not None:
            (rows,) = call.single("shared gate", shared[0], (None, columns))
            call.single("shared up", shared[1], (rows, columns))
            call.single("shared down", shared[2], (columns, rows))
            if rows % inner:
                call.refuse("shared gate", f"of {rows} rows", f"a multiple of the experts' {inner}")

    def ffn(self, activation, gate, up, down, out, add=False):
        call = _Call(self, "ffn")
        tokens, columns = call.activation(activation)
        (rows,) = call.single("gate", gate, (None, columns))
        call.single("up", up, (rows, columns))
        call.single("down", down, (columns, rows))
        call.float("out", out, (tokens, columns), contiguous=True)

    # Attention -------------------------------------------------------------------------------------------------------

    def store(self, rows, slots, cache, floats=None):
        call = _Call(self, "store")
        call.array("rows", rows, floats or self.floats, (None, None), rows=True)
        count = call.cache("cache", cache, rows.shape[1])
        call.index("slots", slots, (len(rows),), count, "slots of the cache")

    def load(self, cache, block_table, out):
        call = _Call(self, "load")
        call.float("out", out, (None, None), contiguous=True)
        slots = call.cache("cache", cache, out.shape[1])
        call.array("block_table", block_table, INT32, (None,), contiguous=True)
        pages = -(-len(out) // PAGE)
        if pages > len(block_table):
            most = PAGE * len(block_table)
            call.refuse("out", f"of {len(out)} rows", f"at most {most}, what the pages of block_table hold,")
        if call.look():
            call.within("block_table", block_table[:pages], slots // PAGE, "pages of the cache")

    def absorb(self, q, k_b, out):
        call = _Call(self, "absorb")
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("out", out, (*q.shape[:2], None), contiguous=True)
        _, nope = call.stack_rows("k_b", k_b)
        rope = q.shape[2] - nope
        if not 0 <= rope < out.shape[2]:
            wanted = f"k_b's {nope} and at most {out.shape[2] - 1} rotated ones"
            call.refuse("q", f"of {q.shape[2]} numbers", wanted)
        call.matrices("k_b", k_b, (q.shape[1], nope, out.shape[2] - rope))

    def absorbed(self, q, latent, rope, step, scale, out, operation="absorbed"):
        call = _Call(self, operation)
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("out", out, (*q.shape[:2], None), rows=True)
        rank, rotated = out.shape[2], q.shape[2] - out.shape[2]
        if rotated < 1 or rank < 1:
            call.refuse("out", f"of {rank} numbers a head", f"fewer than the {q.shape[2]} of q")
        slots = call.cache("latent", latent, rank)
        if call.cache("rope", rope, rotated) != slots:
            call.refuse("rope", f"of {len(rope.data)} slots", f"as many as latent has, {slots},")
        call.step(step, len(q), slots)

    def full(self, q, keys, values, step, scale, out):
        call = _Call(self, "full")
        call.float("q", q, (None, None, None), contiguous=True)
        call.float("out", out, (*q.shape[:2], None), rows=True)
        slots = call.cache("keys", keys, q.shape[1] * q.shape[2])
        if call.cache("values", values, out.shape[1] * out.shape[2]) != slots:
            call.refuse("values", f"of {len(values.data)} slots", f"as many as keys have, {slots},")
        for name, cache, width in (("keys", keys, q.shape[2]), ("values", values, out.shape[2])):
            block = ggml.BLOCK_SIZE.get(cache.qtype)
            if block is None or width % block:  # rows that lie page by page have no blocks of a head
                kind = ggml.NAME.get(cache.qtype, f"of type {cache.qtype}")
                call.refuse(name, kind, f"a type whose blocks divide a head's {width} numbers")
        call.step(step, len(q), slots)

    def sizes(self, operation, keys_values):
        """Tokens, heads, and numbers of a key and of a value, of expanded keys (S, H, D) and values (S, H, v)."""
        call = _Call(self, operation)
        keys, values = getattr(keys_values, "keys", None), getattr(keys_values, "values", None)
        call.array("keys", keys, self.expanded_floats, (None, None, None), contiguous=True)
        call.array("values", values, self.expanded_floats, (*keys.shape[:2], None), contiguous=True)
        return (*keys.shape, values.shape[2])

    def expand(self, c_kv, k_pe, k_b, v_b, sizes):
        """`sizes` are those of the keys and values to be made."""
        call = _Call(self, "expand")
        length, heads, size, v = sizes
        call.float("c_kv", c_kv, (length, None), contiguous=True)
        _, nope = call.stack_rows("k_b", k_b)
        call.float("k_pe", k_pe, (length, None), rows=True)
        call.matrices("k_b", k_b, (heads, nope, c_kv.shape[1]))
        call.matrices("v_b", v_b, (heads, v, c_kv.shape[1]))
        if nope + k_pe.shape[1] != size:
            wanted = f"{size - nope}, what keys have beside k_b's {nope},"
            call.refuse("k_pe", f"of {k_pe.shape[1]} numbers", wanted)

    def expanded(self, q, sizes, positions, out):
        """`sizes` are those of the keys and values."""
        call = _Call(self, "expanded")
        length, heads, size, v = sizes
        call.float("q", q, (None, heads, size), contiguous=True)
        call.float("out", out, (len(q), heads, v), rows=True)
        call.index("positions", positions, (len(q),), length, "positions of the keys")


class _Call:
    """Checks of one operation's arguments."""

    def __init__(self, contract, operation):
        self.contract, self.operation = contract, operation

    def refuse(self, name, got, wanted):
        raise PymlaError(f"{self.operation}: {name} is {got}; {wanted} is expected")

    def array(self, name, array, dtypes, shape, contiguous=False, rows=False):
        """An array of one of some types and of a shape, in which None stands for any size."""
        if not hasattr(array, "strides"):
            self.refuse(name, f"a {type(array).__name__}", f"an array, {_described(dtypes, shape)},")
        fits = len(array.shape) == len(shape)
        fits = fits and all(want is None or have == want for have, want in zip(array.shape, shape, strict=True))
        if array.dtype not in dtypes or not fits:
            self.refuse(name, _described((array.dtype,), array.shape), _described(dtypes, shape))
        if not self.contract.contiguous:
            return
        if contiguous and not _contiguous(array):
            self.refuse(name, f"an array with strides {array.strides}", "a contiguous one")
        if rows and array.shape[-1] > 1 and array.strides[-1] != array.dtype.itemsize:
            self.refuse(name, f"an array with strides {array.strides}", "one with contiguous rows")

    def index(self, name, array, shape, stop, what):
        """An int32 array whose values lie from 0 to below `stop`."""
        self.array(name, array, INT32, shape, contiguous=True)
        if self.look():
            self.within(name, array, stop, what)

    def look(self):
        """Whether values of indices can be looked at."""
        return self.contract.known is not None and self.contract.known()

    def within(self, name, values, stop, what):
        """Values of indices."""
        if not values.size:
            return
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= stop:
            worst = least if least < 0 else most
            raise PymlaError(f"{self.operation}: {name} has {worst}, and {what} go from 0 to {stop - 1}")

    def matrices(self, name, w, shape):
        """A QTensor of matrices with rows of a number of columns; `shape` is (matrices or None, rows, columns), where
        None stands for a single matrix, or for any number of rows. Returns (matrices, rows)."""
        matrices, rows, columns = shape
        if not (hasattr(w, "qtype") and hasattr(w, "data")):
            self.refuse(name, f"a {type(w).__name__}", "a QTensor")
        if w.qtype not in ggml.SUPPORTED:
            known = ", ".join(ggml.NAME[each] for each in ggml.SUPPORTED)
            self.refuse(name, f"of type {ggml.NAME.get(w.qtype, w.qtype)}", f"one of {known}")
        block, row = ggml.BLOCK_SIZE[w.qtype], _dimensions(w)[-1]
        if columns % block:
            kind = ggml.NAME[w.qtype]
            self.refuse(name, f"{kind}, in blocks of {block}", f"a type whose blocks divide {columns} columns")
        if row != ggml.row_bytes(w.qtype, columns):
            have = row // ggml.BLOCK_BYTES[w.qtype] * block
            got = f"{ggml.NAME[w.qtype]} with rows of {have} columns ({row} bytes)"
            self.refuse(name, got, f"a matrix of {columns} columns")
        wanted = (rows, row) if matrices is None else (matrices, rows, row)
        if len(w.data.shape) == 3 and matrices is None:
            wanted = (None, rows, row)
        self.array(name, w.data, _UINT8, wanted, rows=True)
        return w.data.shape[:-1]

    def cache(self, name, cache, width):
        """Rows of a cache, of a number of values. Returns the number of slots."""
        if not (hasattr(cache, "qtype") and hasattr(cache, "data")):
            self.refuse(name, f"a {type(cache).__name__}", "a QTensor")
        qtype, slots = cache.qtype, _dimensions(cache)[0]
        if qtype in self.contract.pages:
            nbytes = self.contract.pages[qtype](width)
            if slots % PAGE:
                self.refuse(name, f"of {slots} slots", f"a multiple of {PAGE}")
        elif qtype in CACHE_TYPES.values() and width % ggml.BLOCK_SIZE[qtype] == 0:
            nbytes = ggml.row_bytes(qtype, width)
        else:
            got = f"of type {ggml.NAME.get(qtype, qtype)}"
            self.refuse(name, got, f"a cache type for rows of {width} numbers")
        self.array(name, cache.data, _UINT8, (slots, nbytes), contiguous=True)
        return slots

    def float(self, name, array, shape, **options):
        self.array(name, array, self.contract.floats, shape, **options)

    def activation(self, activation):
        if not hasattr(activation, "x"):
            self.refuse("activation", f"a {type(activation).__name__}", "an Activation")
        self.float("activation", activation.x, (None, None), contiguous=True)
        return activation.x.shape

    def stack(self, name, w, shape):
        """Several matrices."""
        return self.matrices(name, w, (self.stack_rows(name, w)[0], *shape))

    def single(self, name, w, shape):
        """One matrix."""
        if len(_dimensions(w)) != 2:
            self.refuse(name, "not a matrix", "a QTensor (rows, bytes)")
        return self.matrices(name, w, (None, *shape))

    def stack_rows(self, name, w):
        """How many matrices there are, and how many rows each of them has."""
        if len(_dimensions(w)) != 3:
            self.refuse(name, "not several matrices", "a QTensor (matrices, rows, bytes)")
        return w.data.shape[:2]

    def step(self, step, tokens, slots):
        """A step's own arrays, and that the pages that its tokens see are pages of the cache."""
        tables, seq_of, positions = step.block_tables, step.seq_of, step.positions
        self.array("step.block_tables", tables, INT32, (None, None), contiguous=True)
        sequences, pages = tables.shape
        self.index("step.seq_of", seq_of, (tokens,), sequences, "sequences of the step")
        self.index("step.positions", positions, (tokens,), pages * PAGE, "positions in the pages of a step")
        if self.look():
            seen = np.zeros(sequences, np.int32)
            np.maximum.at(seen, seq_of, positions // PAGE + 1)
            used = tables[np.arange(pages) < seen[:, None]]
            self.within("step.block_tables", used, slots // PAGE, "pages of the cache")


def _contiguous(array):
    flags = getattr(array, "flags", None)
    return flags.c_contiguous if flags is not None else array.contiguous


def _dimensions(tensor):
    """The shape of a QTensor's data; (0,) where it has none."""
    return getattr(getattr(tensor, "data", None), "shape", None) or (0,)


def _described(dtypes, shape):
    """An array in words, such as ``float32 (n, 64)``."""
    sizes = ", ".join("n" if size is None else str(size) for size in shape)
    return f"{' or '.join(map(str, dtypes))} ({sizes}{',' * (len(shape) == 1)})"
