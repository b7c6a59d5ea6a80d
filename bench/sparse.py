"""Sparse attention against dense: seconds of a generated token and of a prompt of 512, as the context grows.

The model has a few layers in the shape of DeepSeek-V3.2 or GLM-5, with random weights, small experts and a small
vocabulary, so that attention is what takes the time. The cache is filled with random rows instead of computed ones:
what they hold changes no time. The indexer's choice is measured on its own as well, by calls from Python.
"""

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tools")]

from make_model import PRESETS, make_model  # noqa: E402

import pymla  # noqa: E402
from pymla.engine.devices import find_device  # noqa: E402
from pymla.errors import PymlaError  # noqa: E402
from pymla.files import outputs  # noqa: E402
from pymla.measure import facts, plot  # noqa: E402
from pymla.pages import CACHE_TYPES  # noqa: E402

#: 6,144 is where dense generation is to cost what sparse does at 65,536 without the indexer.
DEPTHS = (2048, 4096, 6144, 8192, 16384, 32768, 65536, 131072)
#: Rows that are written at a time.
ROWS = 4096

EXAMPLES = """\b
Examples:
  python bench/sparse.py
  python bench/sparse.py --device cuda --cache-type f16 --json build/sparse-gpu.json --plot build/sparse-gpu.png
  python bench/sparse.py --shape glm-5 --depths 4096,16384 --repeat 1
"""


@dataclasses.dataclass(frozen=True)
class Point:
    """Median seconds at a depth; None where nothing was measured."""

    attention: str  # "sparse" or "dense"
    n_kv: int
    step_seconds: float  # of a generated token
    prompt_seconds: float  # of a prompt
    index_seconds: float | None  # of one token's choice in all layers, where it chooses


class Measured:
    """A model with a sequence of random rows.

    Parameters
    ----------
    path : Path
        The model.
    sparse : bool
    settings : dict
        Of `pymla.load`.
    """

    def __init__(self, path: Path, sparse: bool, settings: dict):
        self.language_model = pymla.load(path, dsa=sparse, **settings)
        self.model, self.name = self.language_model.model, "sparse" if sparse else "dense"
        self.sequence = self.model.new_sequence()
        self.rng = np.random.default_rng(1)

    def fill(self, depth: int) -> None:
        """Bring the cache to `depth` tokens."""
        config, cache = self.model.config, self.model.cache
        widths = [config.kv_lora_rank, config.qk_rope_head_dim, *([config.indexer.head_dim] if config.indexer else [])]
        while self.sequence.length < depth:
            batch = [(self.sequence, np.zeros(min(ROWS, depth - self.sequence.length), np.int32))]
            slots = cache.extend(batch).slots
            for backend, layer in zip(self.model.placement.layers, cache.layers, strict=True):
                for rows, width in zip(layer, widths, strict=False):
                    numbers = self.rng.standard_normal((len(slots), width), np.float32)
                    backend.attention.store(backend.memory.to_device(numbers), backend.memory.to_device(slots), rows)
            cache.advance(batch)

    def point(self, depth: int, tg: int, pp: int, repeat: int) -> Point:
        """The times at `depth` tokens."""
        self.fill(depth)
        self._seconds(depth, 1)
        self._seconds(depth, 1)  # recorded and replayed
        steps = [self._seconds(depth, 1) for _ in range(tg)]
        prompts = [self._seconds(depth, pp) for _ in range(repeat)]
        index = [self._index_seconds(depth) for _ in range(repeat + 1)][1:] if self._chooses(depth) else None
        median = statistics.median
        return Point(self.name, depth, median(steps), median(prompts), index and median(index))

    def close(self) -> None:
        """Let go of its memory."""
        self.language_model.close()

    def _chooses(self, depth: int) -> bool:
        indexer = self.model.config.indexer
        return indexer is not None and depth >= indexer.top_k

    def _seconds(self, depth: int, tokens: int) -> float:
        """Of a step behind `depth` tokens; it is forgotten."""
        ids = self.rng.integers(self.model.config.vocab_size, size=tokens, dtype=np.int32)
        began = time.perf_counter()
        logits = self.model.step([(self.sequence, ids)])
        self.model.backend.memory.to_host(logits[:, :1])
        seconds = time.perf_counter() - began
        self.model.cache.truncate(self.sequence, depth)
        return seconds

    def _index_seconds(self, depth: int) -> float:
        """Of the choices of the token behind `depth` tokens."""
        backend, indexer = self.model.backend, self.model.config.indexer
        step = self.model.cache.extend([(self.sequence, np.zeros(1, np.int32))]).on(backend)
        shapes = (1, indexer.heads, indexer.head_dim), (1, indexer.heads)
        q, weights = (backend.memory.to_device(self.rng.standard_normal(shape, np.float32)) for shape in shapes)
        out = backend.memory.empty((1, indexer.top_k), np.int32)
        backend.memory.to_host(out)
        began = time.perf_counter()
        for layer in self.model.cache.layers:
            if len(layer) == 3:
                backend.attention.choose(q, weights, layer.index_keys, step, out)
        backend.memory.to_host(out)
        seconds = time.perf_counter() - began
        self.model.cache.truncate(self.sequence, depth)
        return seconds


def small(shape: str, layers: int):
    """A model's shape with few layers and tokens, and with small experts."""
    preset = PRESETS[shape]
    return dataclasses.replace(
        preset,
        num_hidden_layers=layers,
        indexer_types=preset.indexer_types and preset.indexer_types[:layers],
        first_k_dense_replace=0,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=256,
        vocab_size=1024,
    )


def draw(points: list[Point], path: Path, title: str) -> None:
    """Both times against the depth, on logarithmic axes, a line for each kind of attention and one for the indexer."""
    with plot.picture(path, title, (11, 5.2)) as figure:
        panels = {"step_seconds": "a generated token", "prompt_seconds": "a prompt"}
        for axes, (field, name) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for label, marker in (("dense", "o"), ("sparse", "s")):
                rows = [each for each in points if each.attention == label]
                axes.plot([p.n_kv for p in rows], [1000 * getattr(p, field) for p in rows], marker=marker, label=label)
            index = [each for each in points if each.index_seconds and field == "step_seconds"]
            if index:
                times = [1000 * each.index_seconds for each in index]
                axes.plot([p.n_kv for p in index], times, marker="^", linestyle=":", label="of it the indexer's choice")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
            axes.set_title(name)
            axes.set_xlabel("tokens in the cache (N_KV)")
            axes.set_ylabel("milliseconds")
            axes.grid(alpha=0.3, which="both")
            axes.legend()


def line(point: Point) -> str:
    """A row of the table."""
    index = "-" if point.index_seconds is None else f"{1000 * point.index_seconds:.2f}"
    step, prompt = 1000 * point.step_seconds, 1000 * point.prompt_seconds
    return f"| {point.attention:>6} | {point.n_kv:>7} | {step:>10.2f} | {prompt:>10.1f} | {index:>10} |"


def _numbers(_context, _option, text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise click.BadParameter("write numbers with commas between, as in 4096,65536") from None


@click.command(epilog=EXAMPLES)
@click.option("--shape", type=click.Choice(["v3.2", "glm-5", "glm-5.2"]), default="v3.2", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--qtype", default="q4_0", show_default=True, help="Type of the matrices.")
@click.option("--depths", callback=_numbers, default=",".join(map(str, DEPTHS)), show_default=True, metavar="N,N,…")
@click.option("--pp", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--tg", type=click.IntRange(min=1), default=16, show_default=True, help="Generated tokens.")
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Prompts at each depth.")
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="q8_0", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all usable cores]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=HERE / "results" / "sparse.json")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), default=HERE / "results" / "sparse.png")
def main(shape, layers, qtype, depths, pp, tg, repeat, cache_type, device, threads, json_path, plot_path):
    """Measure sparse and dense attention at each depth; write a JSON file and a picture."""
    try:
        plot.check(plot_path)
        device, _ = find_device(device)
        about = facts.gather(facts.measure_limits(device, threads), device)
        model = small(shape, layers)
        settings = {"cache_type": cache_type, "device": device, "threads": threads}
        click.echo(f"{facts.describe(about)}\n\n|        |    N_KV | a token ms | prompt  ms | choice  ms |")
        click.echo("|-------:|--------:|-----------:|-----------:|-----------:|")
        points = []
        with tempfile.TemporaryDirectory() as folder:
            path = make_model(Path(folder) / "model.gguf", model, layout="split", qtype=qtype)
            both = [Measured(path, sparse, settings | {"ctx": depths[-1] + pp}) for sparse in (False, True)]
            for depth in depths:
                for measured in both:  # by turns, so that a busy machine slows both down
                    points.append(measured.point(depth, tg, pp, repeat))
                    click.echo(line(points[-1]))
            for measured in both:
                measured.close()
    except PymlaError as error:
        raise click.ClickException(str(error)) from None
    what = {"shape": dataclasses.asdict(model), "qtype": qtype, "pp": pp, "tg": tg, "cache_type": cache_type}
    report = about | what | {"points": [dataclasses.asdict(each) for each in points]}
    outputs.write(json_path, (json.dumps(report, indent=1) + "\n").encode())
    title = f"{model.name}, {layers} layer{'s' * (layers > 1)}, {qtype}, {cache_type} cache, prompt of {pp}"
    draw(points, plot_path, f"{title}\n{facts.describe_machine(about)}, {about['date'][:10]}")


if __name__ == "__main__":
    main()
