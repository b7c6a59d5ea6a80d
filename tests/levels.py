"""Results of the CPU's operations at the level of this process, for comparison with those of another process."""

import sys
from unittest import mock

import cpu_functions
import numpy as np
import operations
from cases import REPRESENTATIVES, latent_layout, on_cpu, poisoned_cache, ragged_step, random_qtensor

from pymla import cpu, ggml
from pymla.cpu.quantise import quantise


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def products():
    """(name, result) of products with types of every feature, of few and of many tokens."""
    for qtype in REPRESENTATIVES:
        name = ggml.NAME[qtype]
        w, heads = random_qtensor(qtype, 5, 256), random_qtensor(qtype, 2, 6, 256)
        for tokens in (1, 6):
            x = cpu.quant.Activation(normal(tokens, 256))
            yield f"matmul {name} {tokens}", cpu.quant.matmul(w, x, np.empty((tokens, 5), np.float32))
        x, y = normal(1, 2, 256), normal(1, 2, 6)
        yield f"matmul_heads {name}", cpu.quant.matmul_heads(heads, x, np.empty((1, 2, 6), np.float32))
        out = np.empty((1, 2, 256), np.float32)
        yield f"matmul_heads_transposed {name}", cpu.quant.matmul_heads_transposed(heads, y, out)


def functions():
    """(name, result) of the functions of every type."""
    for qtype in ggml.SUPPORTED:
        name, k = f"functions {ggml.NAME[qtype]}", 256 if ggml.BLOCK_SIZE[qtype] > 32 else 416
        found = cpu_functions.call(random_qtensor(qtype, 5, k), normal(1, k), 0.5, 0, normal(5, k))
        yield f"{name} products", found.products
        yield f"{name} sums", found.sums
        if qtype in ggml.QUANTISED:
            yield f"{name} panel", cpu_functions.panel_weights(qtype, found, 0)
        else:
            yield f"{name} weights", found.weights
        if cpu_functions.writes_rows(qtype):
            yield f"{name} written", found.written


def attended():
    """(name, result) of the absorbed form over each type of cache, with a page and a few positions more."""
    for cache_type in ("f16", "q8_0"):
        step = ragged_step((66,), (1,), 2)
        layout = latent_layout(cache_type, 64, 12)
        cache = on_cpu(layout, poisoned_cache(layout, step, (66,), 2))
        q = normal(1, 3, 76)
        for attend in (cpu.attention.absorbed, cpu.attention.absorbed_materialised):
            out = np.empty((1, 3, 64), np.float32)
            yield f"{attend.__name__} {cache_type}", attend(q, *cache, step, 0.1, out)


def operated(seed):
    """(name, result) of every operation once, with random sizes. `products` has the types of matrices."""
    with mock.patch.object(operations, "MATRIX_TYPES", ((ggml.Q4_0, ggml.Q4_0),)):
        calls = list(operations.calls(np.random.default_rng(seed), cpu))
    for i, (operation, arguments) in enumerate(calls):
        copied = {name: operations.copied(value) for name, value in arguments.items()}
        result = operations.run(cpu, operation, copied)
        name = f"{i} {operation.__module__}.{operation.__name__}"
        if operation is cpu.moe.router:
            result = copied["ids"], copied["weights"]
        for j, array in enumerate(result if isinstance(result, tuple) else (result,)):
            if isinstance(array, np.ndarray):
                yield f"{name} {j}", array


def quantised():
    """(name, blocks) of quantisers of each kind: of a scale, and of scales and minima of a super-block."""
    for qtype in (ggml.Q4_0, ggml.Q4_K):
        yield f"quantised {ggml.NAME[qtype]}", quantise(normal(1, 256), qtype, np.exp(normal(256)))


def results():
    """All of them, by name. Shares of pages depend on the number of threads."""
    cpu.set_threads(2)
    return {
        name: np.array(array)
        for made in (products(), functions(), attended(), operated(8), quantised())
        for name, array in made
    }


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())
