"""How fast a checkpoint becomes a GGUF file, beside copying its bytes, and how much memory that takes.

A checkpoint of random weights is made, in BF16 and shards of a gibibyte, with tensors of V2-Lite's size or of V3's.
Then ``cp`` copies it, and ``pymla convert`` converts it, each in a process of its own and several times in turn. A
rate is bytes of the checkpoint by seconds, until all of the result is on the disk. Weights repeat every 32 MiB, which
no file system here notices.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from pymla.measure import facts

EXAMPLES = """\b
Examples:
  python bench/conversion.py /disk/scratch --gib 20
  python bench/conversion.py /disk/scratch --gib 2 --type auto --type Q8_0 --rounds 3 --cold
  python bench/conversion.py /disk/scratch --shapes v3 --gib 1 --type Q4_K_M --rounds 1"""

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from hub import CODER, TOKENIZER_CONFIG, V3, tokenizer_json, write_json  # noqa: E402
from hub import shapes as tensor_shapes  # noqa: E402

#: Layers of this model have half a billion weights, most of them in 64 experts of the size of V2-Lite's.
_LITE = V3 | {
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 0,
    "num_attention_heads": 16,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_group": 8,
    "topk_group": 4,
}
#: The largest tensors of DeepSeek-V3, and few of its experts: a dense layer, and one with experts.
_V3 = _LITE | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
}
CONFIGS = {"lite": _LITE, "v3": _V3}
_SHARD = 1 << 30
_NOISE = 1 << 24  # weights


@click.command(epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--gib", type=float, default=20.0, show_default=True, help="Size of the checkpoint, at least.")
@click.option("--shapes", type=click.Choice(list(CONFIGS)), default="lite", show_default=True, help="Of tensors.")
@click.option("--type", "types", multiple=True, default=("auto", "Q8_0"), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--cold", is_flag=True, help="Take the checkpoint out of the page cache before every run.")
@click.option("--keep", is_flag=True, help="Keep the checkpoint.")
def main(folder: Path, gib: float, shapes: str, types: tuple[str, ...], rounds: int, cold: bool, keep: bool) -> None:
    """Measure in FOLDER, which needs room for the checkpoint twice. Prints JSON."""
    source, target = folder / "checkpoint", folder / "result"
    folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        make_checkpoint(source, gib, CONFIGS[shapes])
    files = sorted(source.glob("*.safetensors"))
    nbytes = sum(path.stat().st_size for path in files)
    program = [sys.executable, "-m", "pymla", "convert", str(source), str(target / "m.gguf"), "--type"]
    commands = {"cp": ["cp", *map(str, files), str(target)]} | {each: [*program, each] for each in types}
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            target.mkdir()
            if cold:
                for path in files:
                    _forget(path)
            found[name].append(_run(command, target))
            shutil.rmtree(target)
    if not keep:
        shutil.rmtree(source)
    click.echo(json.dumps(_report(found, nbytes) | {"cold": cold, "machine": facts.machine()}, indent=2))


class Run(NamedTuple):
    """What a command took."""

    seconds: float  # until its results were on the disk
    cpu_seconds: float  # of all cores
    peak: int  # bytes of memory


def make_checkpoint(folder: Path, gib: float, config: dict[str, Any]) -> None:
    """Write a checkpoint of at least so many gibibytes, in BF16, with at least one layer of each kind."""
    first = config["first_k_dense_replace"]  # layer with experts
    last = tensor_shapes(config | {"num_hidden_layers": first + 1})
    per_layer = 2 * sum(_weights(shape) for name, shape in last.items() if f".layers.{first}." in name)
    config = config | {"num_hidden_layers": first + max(1, -(-int(gib * 2**30) // per_layer))}
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_json(CODER))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    noise = np.random.default_rng(0).normal(0, 0.02, _NOISE).astype(np.float32).view(np.uint32) >> 16
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in tensor_shapes(config).items():
        if sum(map(_weights, groups[-1].values())) * 2 > _SHARD:
            groups.append({})
        groups[-1][name] = shape
    for number, group in enumerate(groups, 1):
        path = folder / f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_shard(path, group, noise.astype(np.uint16).tobytes())


def _weights(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], noise: bytes) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * _weights(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(noise[:end])
        os.fsync(file.fileno())


def _forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(command: list[str], target: Path) -> Run:
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(errors)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(time.monotonic() - began, usage.ru_utime + usage.ru_stime, peak)


def _report(found: dict[str, list[Run]], nbytes: int) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(run.seconds for run in found[name])

    return {
        "bytes": nbytes,
        "runs": {
            name: {
                "seconds": [round(run.seconds, 2) for run in runs],
                "cpu_seconds": [round(run.cpu_seconds, 2) for run in runs],
                "bytes_per_second": round(nbytes / median(name)),
                "of_cp": round(median("cp") / median(name), 3),
                "peak_bytes": max(run.peak for run in runs),
            }
            for name, runs in found.items()
        },
    }


if __name__ == "__main__":
    main()
