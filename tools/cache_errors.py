"""What each type of cache costs: perplexity, and how far logits are from those over a float32 cache.

Windows are cut from the text as in ``tools/perplexity.py``; columns are those of the table in ``docs/accuracy.md``.
"""

import math
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from llama_losses import token_losses
from perplexity import spread_windows, with_bos

import pymla
from pymla.cli.device import dsa_option
from pymla.cli.inputs import read
from pymla.engine.cache_layout import row_bytes
from pymla.errors import PymlaError
from pymla.pages import CACHE_TYPES

EXAMPLES = """\b
Example:
  python tools/cache_errors.py pymla/demo.gguf heldout.txt --windows 64
"""


class Errors(NamedTuple):
    """Differences of logits from others of the same tokens."""

    rms: float  # root mean square, as a share of the standard deviation of the others
    divergence: float  # Kullback-Leibler, mean of the tokens, nats
    same_top: float  # share of tokens whose likeliest next token is the same


def errors(logits: np.ndarray, others: np.ndarray) -> Errors:
    """Of logits (n, V) from others (n, V)."""
    log_p, log_q = (_log_softmax(each.astype(np.float64)) for each in (others, logits))
    rms = math.sqrt(np.mean((logits - others) ** 2.0)) / others.std()
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    return Errors(rms, float(divergence), float(np.mean(logits.argmax(-1) == others.argmax(-1))))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@click.command(epilog=EXAMPLES)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window.")
@click.option("--windows", "limit", type=click.IntRange(min=1), help="At most so many windows. [default: all]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--mla", default="auto", show_default=True)
@dsa_option
@click.option("--threads", type=click.IntRange(min=1))
def main(model, text, window, limit, device, mla, dsa, threads):
    """Print a table of the cache types, for MODEL, a GGUF file, on the file TEXT."""
    from pymla.text.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_gguf(model)
        windows = with_bos(spread_windows(tokenizer.encode(read(text)), tokenizer, window, limit))
        click.echo("| cache | bytes a token | perplexity | logits, rms | divergence, nats | same likeliest token |")
        click.echo("| --- | ---: | ---: | ---: | ---: | ---: |")
        exact = None
        for cache_type in CACHE_TYPES:
            options = {"device": device, "cache_type": cache_type, "mla": mla, "dsa": dsa, "threads": threads}
            with pymla.load(model, ctx=window, **options) as loaded:
                logits = np.array([loaded.logits(each.tolist()) for each in windows])
                nbytes = row_bytes(loaded.config, cache_type, mla)
            loss = np.mean([token_losses(*each) for each in zip(logits, windows, strict=True)])
            logits = logits.reshape(-1, logits.shape[-1])
            exact = logits if exact is None else exact
            found = errors(logits, exact)
            click.echo(
                f"| {cache_type} | {nbytes:,} | {math.exp(loss):.4f} | {found.rms:.2%} | {found.divergence:.1e} | "
                f"{found.same_top:.1%} |"
            )
    except PymlaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"\n{model}: {len(windows)} windows of {window} tokens, mla {mla}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
