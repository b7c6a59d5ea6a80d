"""The table of models in docs/models.md: the error of each against transformers, in every mode, short and long.

A model is small and random, built as the real one (`model_shapes.tiny`). An error is the largest difference of a logit
as a share of the largest logit; the cache is float32. The long prompt goes beyond the original context, where there is
one.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from make_golden import SEED, clear_model, hf_class, logits, prompts, to_gguf
from model_shapes import PRESETS, tiny

from pymla.engine.forms import MLA_MODES, SPARSE_MODES
from pymla.make.model_metadata import Shape


def _distinct() -> dict[str, Shape]:
    found: dict[tuple[str, Shape], tuple[str, Shape]] = {}
    for name, real in PRESETS.items():
        # transformers does not have PLM: tests/test_families.py defines it.
        if not name.startswith("tiny") and real.architecture != "plm":
            shape = tiny(real)
            found.setdefault((hf_class(shape), dataclasses.replace(shape, name="")), (name, shape))
    return dict(found.values())


#: Small models that are built as the presets, by the presets' names; of presets that are built alike, the first.
MODELS = _distinct()

EXAMPLES = """\b
Examples:
  python tools/model_errors.py
  python tools/model_errors.py mistral-large-3 --device cpu
"""


def modes_of(shape: Shape) -> tuple[str, ...]:
    """The modes in which a model runs."""
    return SPARSE_MODES if shape.index_topk else MLA_MODES


def errors(name: str, devices: tuple[str, ...]) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
    """For each device the errors with a short and with a long prompt, by mode."""
    import pymla

    shape = MODELS[name]
    model, seed = clear_model(shape, SEED)
    ids = prompts(shape, seed)
    expected = {prompt: logits(model, ids[prompt]) for prompt in ("short", "long")}
    with tempfile.TemporaryDirectory() as folder:
        path = to_gguf(model, shape, Path(folder) / "model.gguf")
        for device in devices:
            found = {}
            for mla in modes_of(shape):
                with pymla.load(path, device=device, mla=mla, cache_type="f32") as loaded:
                    short, long = (_error(loaded.logits(ids[each]), expected[each]) for each in expected)
                found[mla] = short, long
            yield device, found


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest expected magnitude."""
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


@click.command(epilog=EXAMPLES)
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
@click.option("--device", "devices", multiple=True, default=("reference", "cpu"), show_default=True)
def main(models: tuple[str, ...], devices: tuple[str, ...]) -> None:
    """Print a row of the table for each of MODELS, by default all, and for each device."""
    click.echo(
        "| preset | class of transformers | backend | " + " | ".join(f"`--mla {mla}`" for mla in MLA_MODES) + " |"
    )
    click.echo("| --- | --- | --- |" + " ---: |" * len(MLA_MODES))
    for name in models or MODELS:
        for device, found in errors(name, devices):
            cells = ("{:.0e}, {:.0e}".format(*found[mla]) if mla in found else "-" for mla in MLA_MODES)
            click.echo(f"| {name} | {hf_class(MODELS[name])} | {device} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
