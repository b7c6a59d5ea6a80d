"""Rates of llama.cpp through llama-cpp-python; run by `against.py` with an interpreter that has the package.

    python llama_python.py '{"model": …, "pp": …, "tg": …, "depths": […], "threads": …, "cache_type": …}' [NAME=VALUE …]

It depends on nothing else, and prints JSON.
"""

import ast
import json
import random
import sys
import time

from llama_cpp import Llama

#: Numbers of ggml's types.
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}


def measure(model, pp, tg, depths, threads, cache_type, **options):
    """Rates at each depth, by the same steps as `pymla bench`."""
    settings = {
        "n_ctx": depths[-1] + max(pp, tg),
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": threads,
        "n_threads_batch": threads,
        "type_k": CACHE_TYPES[cache_type],
        "flash_attn": True,
        "verbose": False,
    }
    llama = Llama(model_path=model, **{**settings, **options})
    random.seed(1)
    vocabulary = llama.n_vocab()

    def tokens(count):
        return [random.randrange(vocabulary) for _ in range(count)]

    def forget(length):
        # `eval` drops what the cache holds from there on.
        llama.n_tokens = length

    llama.eval(tokens(1))
    for depth in depths:
        if llama.n_tokens < depth:
            llama.eval(tokens(depth - llama.n_tokens))
        forget(depth)
        began = time.perf_counter()
        for _ in range(tg):
            llama.eval(tokens(1))
        tg_seconds = time.perf_counter() - began
        forget(depth)
        prompt = tokens(pp)
        began = time.perf_counter()
        llama.eval(prompt)
        pp_seconds = time.perf_counter() - began
        yield {"n_kv": depth, "s_pp": pp / pp_seconds, "s_tg": tg / tg_seconds if tg else None}


def main():
    options = json.loads(sys.argv[1])
    for pair in sys.argv[2:]:
        name, _, value = pair.partition("=")
        options[name] = ast.literal_eval(value)
    print(json.dumps(list(measure(**options))))


if __name__ == "__main__":
    main()
