"""Perplexity of a GGUF file on a text: pymla's, and on the same tokens that of transformers and of llama.cpp.

Windows overlap by one token: each is read on its own, behind the BOS token, and every other token of it counts, unlike
those of ``pymla perplexity``. The held-out text of the demo model comes from ``tools/train_demo.py --heldout-out``.
"""

import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from llama_losses import token_losses

import pymla
from pymla.cli.device import dsa_option
from pymla.cli.inputs import read
from pymla.errors import PymlaError
from pymla.make.perplexity import Windows, cache_tokens, cut, window_losses

EXAMPLES = """\b
Examples:
  python tools/perplexity.py pymla/demo.gguf heldout.txt
  python tools/perplexity.py pymla/demo.gguf heldout.txt --hf build/demo --llama-python ~/llama/bin/python
"""


def spread_windows(ids: list[int], tokenizer, length: int, limit: int | None) -> Windows:
    """Windows of `length` tokens, of which all but the first count: at most `limit`, evenly spread over the text.

    Raises
    ------
    PymlaError
        The text is shorter than one window.
    """
    windows = cut(ids, length, tokenizer, stride=length - 1)
    count = len(windows.tokens)
    if limit is None or limit >= count:
        return windows
    return windows._replace(tokens=windows.tokens[np.linspace(0, count - 1, limit).astype(int)])


def with_bos(windows: Windows) -> np.ndarray:
    """The tokens of windows as engines read them: int64 (windows, length)."""
    tokens = windows.tokens.astype(np.int64)
    if windows.bos is not None:
        tokens[:, 0] = windows.bos
    return tokens


def pymla_losses(model: Path, windows: Windows, options: dict):
    with pymla.load(model, ctx=windows.ctx, cache_tokens=cache_tokens(windows.ctx), **options) as loaded:
        return np.array(list(window_losses(loaded.model, windows)))


def transformers_losses(folder: Path, windows: np.ndarray, threads: int | None):
    import torch
    from transformers import AutoModelForCausalLM

    if threads:
        torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.no_grad():
        for window in windows:
            logits = model(torch.from_numpy(window)[None], use_cache=False).logits[0].numpy()
            found.append(token_losses(logits, window))
    return np.array(found)


def llama_losses(python: str, model: Path, windows: np.ndarray, cache_type: str, threads: int | None):
    """Losses by llama.cpp in another interpreter, and the version of its llama-cpp-python."""
    script = Path(__file__).with_name("llama_losses.py")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "windows.npy"), Path(folder, "losses.npy")
        np.save(source, windows)
        run = subprocess.run(
            [python, script, model, source, out, cache_type, str(threads or 2)], capture_output=True, text=True
        )
        if run.returncode:
            last = run.stderr.strip().splitlines()[-1:] or ["no message"]
            raise PymlaError(f"{python}: llama-cpp-python failed: {last[0]}")
        return np.load(out), json.loads(run.stdout.splitlines()[-1])["version"]


def report(engine: str, losses: np.ndarray, seconds: float, reference: float | None) -> dict:
    """A row of the table; the standard error is that of the windows' means."""
    loss = losses.mean()
    by_window = losses.mean(-1)
    error = by_window.std(ddof=1) / math.sqrt(len(by_window)) if len(by_window) > 1 else math.nan
    return {
        "engine": engine,
        "loss": loss,
        "perplexity": math.exp(loss),
        "standard_error": math.exp(loss) * error,
        "relative_to_first": None if reference is None else math.exp(loss - reference) - 1,
        "seconds": round(seconds, 2),
    }


@click.command(epilog=EXAMPLES)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window.")
@click.option("--windows", "limit", type=click.IntRange(min=1), help="At most so many windows. [default: all]")
@click.option("--device", default="auto", show_default=True)
@click.option("--cache-type", "cache_types", multiple=True, help="pymla's cache, may be repeated. [default: f32, q8_0]")
@click.option("--mla", default="auto", show_default=True)
@dsa_option
@click.option("--hf", type=click.Path(exists=True, path_type=Path), help="Hugging Face folder, for transformers.")
@click.option("--llama-python", help="Python that has llama-cpp-python, for llama.cpp.")
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True)
def main(model, text, window, limit, device, cache_types, mla, dsa, hf, llama_python, threads, as_json):
    """Print the perplexity of MODEL, a GGUF file, on the file TEXT."""
    from pymla.text.tokenizer import Tokenizer

    versions = {"Python": platform.python_version(), "pymla": pymla.__version__}
    rows = []

    def add(engine, function, *arguments):
        start = time.perf_counter()
        found = function(*arguments)
        losses, version = found if isinstance(found, tuple) else (found, None)
        if version is not None:
            versions["llama-cpp-python"] = version
        rows.append(report(engine, losses, time.perf_counter() - start, rows[0]["loss"] if rows else None))

    try:
        tokenizer = Tokenizer.from_gguf(model)
        windows = spread_windows(tokenizer.encode(read(text)), tokenizer, window, limit)
        tokens = with_bos(windows)
        for cache_type in cache_types or ("f32", "q8_0"):
            options = {"device": device, "cache_type": cache_type, "mla": mla, "dsa": dsa, "threads": threads}
            add(f"pymla, cache {cache_type}", pymla_losses, model, windows, options)
        if hf:
            versions |= {name: importlib.metadata.version(name) for name in ("transformers", "torch")}
            add("transformers, float32", transformers_losses, hf, tokens, threads)
        if llama_python:
            for cache_type in ("f32", "f16"):
                add(f"llama.cpp, cache {cache_type}", llama_losses, llama_python, model, tokens, cache_type, threads)
    except PymlaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    if as_json:
        found = {"model": str(model), "text": str(text), "windows": len(tokens), "window": window}
        click.echo(json.dumps(found | {"rows": rows, "versions": versions}, indent=2))
        return
    click.echo(f"{model} on {text}: {len(tokens)} windows of {window} tokens")
    for row in rows:
        relative = "" if row["relative_to_first"] is None else f"  {row['relative_to_first']:+.4%}"
        click.echo(
            f"  {row['engine']:24} {row['perplexity']:9.4f} ± {row['standard_error']:.4f}  "
            f"loss {row['loss']:.5f}  {row['seconds']:7.2f} s{relative}"
        )
    click.echo(", ".join(f"{name} {version}" for name, version in versions.items()))


if __name__ == "__main__":
    main()
