"""llama.cpp's losses on windows of tokens, through llama-cpp-python; perplexity.py runs it.

Imports nothing of pymla, so that it runs in any environment that has llama-cpp-python.
"""

import json
import sys

import numpy as np


def token_losses(logits: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Negative log-probability, float64 (T - 1,), of each token of a window but the first, from its logits (T, V)."""
    logits = logits[: len(window) - 1].astype(np.float64)
    largest = logits.max(-1)
    log_sum = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
    return log_sum - logits[np.arange(len(logits)), window[1:]]


def losses(model: str, windows: np.ndarray, cache_type: str, threads: int) -> np.ndarray:
    """Losses, float64 (windows, T - 1), of token windows, int (windows, T), with a cache of type f32 or f16."""
    import llama_cpp

    kind = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[cache_type]
    length = windows.shape[1]
    llama = llama_cpp.Llama(
        model,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        type_k=kind,
        type_v=kind,
        flash_attn=False,
        verbose=False,
    )
    found = []
    for window in windows:
        llama.reset()
        llama.eval(window.tolist())
        found.append(token_losses(np.array(llama.scores[:length]), window))
    return np.array(found)


if __name__ == "__main__":
    import llama_cpp

    path, source, out, cache, count = sys.argv[1:]
    np.save(out, losses(path, np.load(source), cache, int(count)))
    print(json.dumps({"version": llama_cpp.__version__}))
