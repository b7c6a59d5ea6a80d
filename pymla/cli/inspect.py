"""``pymla inspect``: what a model file holds, and what it takes to run it."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from pymla import ggml, scratch
from pymla.cli.device import check_tensors_option
from pymla.cli.generate import Terminal
from pymla.cli.output import write_json
from pymla.engine import costs
from pymla.engine.cache import row_bytes
from pymla.engine.filecheck import Examined, examine
from pymla.engine.planning import LEAST_CTX, Planner, Split
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.host.memory import available_memory, size_text
from pymla.models.config import ModelConfig
from pymla.pages import CACHE_TYPES
from pymla.printable import one_line
from pymla.text.tokenizer import Tokenizer

#: Tokens in the cache at which costs are shown.
CONTEXTS = (0, 4096, 16384)

#: Tokens of a prompt step, for its costs and its scratch memory.
PROMPT_TOKENS = 512

_LAYOUTS = {
    (True, False): "kv_b",
    (False, True): "k_b + v_b",
    (True, True): "all: kv_b, k_b and v_b",
}
_LONGEST_ARRAY = 16  # elements of metadata arrays that are shown one by one
_MOST_PROBLEMS = 10  # that are shown to a person


def report(
    file: ModelFile, check_tensors: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """All that the command shows, as values that JSON can hold; arguments as for `pymla.engine.filecheck.examine`.

    Never fails for what the engine cannot run: ``runs`` says whether `pymla.load` takes the file, ``problems`` why not.
    ``config``, ``memory`` and ``costs`` are None where they cannot be known.
    """
    found = examine(file, check_tensors=check_tensors, progress=progress)
    config, problems = found.config, [str(error).removeprefix(f"{file.path}: ") for error in found.problems]
    memory, step_costs = _estimates(file, found)
    return {
        "path": str(file.path),
        "parts": [str(part) for part in file.parts],
        "bytes": file.nbytes,
        "version": file.version,
        "architecture": _json(file.metadata.get("general.architecture")),
        "name": _json(file.metadata.get("general.name")),
        "weights": sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        "layout": _layout(file),
        "runs": not problems,
        "problems": problems,
        "config": None if config is None else dataclasses.asdict(config) | {"softmax_scale": config.softmax_scale},
        "types": _types(file),
        "tokenizer": _tokenizer(file, found.tokenizer),
        "memory": memory,
        "costs": step_costs,
        "metadata": {key: _json(value) for key, value in file.metadata.items()},
        "tensors": [
            {
                "name": tensor.name,
                "type": ggml.NAME[tensor.qtype],
                "shape": list(tensor.shape),
                "bytes": tensor.data.nbytes,
                "part": file.parts.index(tensor.path) + 1,
            }
            for tensor in file.tensors.values()
        ],
    }


def _json(value: Any) -> Any:
    """A metadata value that JSON can hold: long arrays are told by their length."""
    if not isinstance(value, list | np.ndarray):
        return value
    if len(value) > _LONGEST_ARRAY:
        return {"length": len(value)}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _estimates(file: ModelFile, found: Examined) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None]:
    """Memory and costs; None where the file has other tensors than its metadata says."""
    if found.config is None:
        return None, None
    try:
        return _memory(found.config, file), _costs(found.config, file)
    except PymlaError:
        if not found.problems:
            raise
        return None, None


def _layout(file: ModelFile) -> str | None:
    blk = "blk.0.attn_"
    return _LAYOUTS.get((f"{blk}kv_b.weight" in file.tensors, f"{blk}k_b.weight" in file.tensors))


def _types(file: ModelFile) -> list[dict[str, Any]]:
    """Counts by type, most bytes first."""
    types: dict[int, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        name, supported = ggml.NAME[tensor.qtype], tensor.qtype in ggml.SUPPORTED
        entry = types.setdefault(
            tensor.qtype, {"type": name, "tensors": 0, "weights": 0, "bytes": 0, "supported": supported}
        )
        entry["tensors"] += 1
        entry["weights"] += math.prod(tensor.shape)
        entry["bytes"] += tensor.data.nbytes
    return sorted(types.values(), key=lambda entry: -entry["bytes"])


def _tokenizer(file: ModelFile, tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    prefix = "tokenizer.ggml."
    found = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if not found:
        return None
    tokens = found.get("tokens")
    vocabulary = tokens if isinstance(tokens, list) else []
    special = {}
    for key, value in found.items():
        if key.endswith("_token_id"):
            known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(vocabulary)
            token = vocabulary[value] if known else None
            special[key.removesuffix("_token_id")] = {"id": _json(value), "token": token}
    ends = warnings = None
    if tokenizer:
        ends = [{"id": token, "token": vocabulary[token]} for token in sorted(tokenizer.eos_ids)]
        warnings = tokenizer.warnings
    return {
        "model": _json(found.get("model")),
        "pre": _json(found.get("pre")),
        "tokens": _length(tokens),
        "merges": _length(found.get("merges")),
        "special": special,
        "ends_of_text": ends,
        "warnings": warnings,
        "add_bos": _json(found.get("add_bos_token")),
        "add_eos": _json(found.get("add_eos_token")),
        "chat_template": "tokenizer.chat_template" in file.metadata,
        "chat_templates": [
            key.removeprefix("tokenizer.chat_template.")
            for key in file.metadata
            if key.startswith("tokenizer.chat_template.")
        ],
    }


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | np.ndarray) else None


def _memory(config: ModelConfig, file: ModelFile) -> dict[str, Any]:
    planner = Planner(config, file, "q8_0", "auto")
    plan = planner.host(Split(0), config.context_length)
    rows = {cache_type: row_bytes(config, cache_type, "auto") for cache_type in CACHE_TYPES}
    return {
        "weights": plan.weights,
        "derived": plan.derived,
        "scratch": plan.scratch,
        "scratch_tokens": scratch.SLICE,
        "process": plan.process,
        "available": available_memory(),
        "cache_per_1000_tokens": {cache_type: 1000 * nbytes for cache_type, nbytes in rows.items()},
        "cache_at_context_length": {
            cache_type: costs.cache_bytes(config, cache_type, "auto", config.context_length) for cache_type in rows
        },
        "gpu": [
            {
                "context": context,
                "all": planner.device(Split.all(config), context).total,
                "cpu_moe": planner.device(Split.all(config)._replace(cpu_moe=True), context).total,
            }
            for context in sorted({min(LEAST_CTX, config.context_length), config.context_length})
        ],
    }


def _costs(config: ModelConfig, file: ModelFile) -> list[dict[str, Any]]:
    """A token's costs in a prompt step and in generation, after `context` tokens."""
    return [
        {
            "context": context,
            "prompt": _token_cost(config, file, PROMPT_TOKENS, context),
            "generation": _token_cost(config, file, 1, context),
        }
        for context in CONTEXTS
        if context < config.context_length
    ]


def _token_cost(config: ModelConfig, file: ModelFile, tokens: int, context: int) -> dict[str, Any]:
    ops = costs.step_ops(config, file.tensors, tokens, context + tokens)
    nbytes = sum(op.nbytes for op in ops)
    cache = sum(op.nbytes for op in ops if op.name == "attention")
    return {
        "tokens": tokens,
        "macs": sum(op.macs for op in ops) / tokens,
        "bytes": nbytes / tokens,
        "cache_share": cache / nbytes,
        "ops": {op.name: {"macs": op.macs / tokens, "bytes": op.nbytes / tokens} for op in ops},
    }


# What a person reads --------------------------------------------------------------------------------------------------


class _Page:
    """Tables, one below the other. Names and values come from the file, so nothing in them is taken for markup."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)

    def table(self, title: str, *columns: str, rows: list[tuple], numbers: tuple[int, ...] = ()) -> None:
        """Print a table. Columns whose index is in `numbers` are aligned to the right; no columns, no header."""
        from rich import box
        from rich.padding import Padding
        from rich.table import Table
        from rich.text import Text

        width = len(rows[0])
        table = Table(box=box.SIMPLE_HEAD if columns else None, show_header=bool(columns), show_edge=False)
        for index in range(width):
            right = index in numbers
            table.add_column(
                columns[index] if columns else "",
                justify="right" if right else "left",
                no_wrap=right,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
        self.console.print(Text(f"\n{title}", style="bold"))
        self.console.print(Padding(table, (0, 0, 0, 1), expand=False))

    def warn(self, message: str) -> None:
        from rich.text import Text

        self.console.print(Text(message, style="bold red"))


def _show(found: dict[str, Any], tensors: bool) -> None:
    page = _Page()
    for problem in found["problems"][:_MOST_PROBLEMS]:
        page.warn(f"Not run: {_plain(problem, 1000)}")
    more = len(found["problems"]) - _MOST_PROBLEMS
    if more > 0:
        page.warn(f"And {more} more such problem{'s' * (more > 1)}; --json lists all of them.")
    page.table("File", rows=_file_rows(found))
    page.table("Model", rows=_model_rows(found))
    if found["types"]:
        rows = [
            (
                entry["type"] if entry["supported"] else f"{entry['type']} (not run)",
                entry["tensors"],
                _count(entry["weights"]).strip(),
                size_text(entry["bytes"]),
            )
            for entry in found["types"]
        ]
        page.table("Types", "type", "tensors", "weights", "size", rows=rows, numbers=(1, 2, 3))
    if found["tokenizer"]:
        page.table("Tokenizer", rows=_tokenizer_rows(found["tokenizer"]))
    if found["memory"]:
        _show_memory(page, found["memory"], found["config"]["context_length"])
    if found["costs"]:
        _show_costs(page, found["costs"])
    if tensors and found["tensors"]:
        rows = [
            (_plain(tensor["name"]), tensor["type"], " × ".join(map(str, tensor["shape"])), size_text(tensor["bytes"]))
            for tensor in found["tensors"]
        ]
        page.table("Tensors", "name", "type", "shape", "size", rows=rows, numbers=(3,))


def _file_rows(found: dict[str, Any]) -> list[tuple]:
    parts = f" in {len(found['parts'])} parts" if len(found["parts"]) > 1 else ""
    return [
        ("path", _plain(found["path"], 1000)),
        ("size", size_text(found["bytes"]) + parts),
        ("format", f"GGUF {found['version']}, {len(found['metadata'])} keys, {len(found['tensors'])} tensors"),
    ]


def _model_rows(found: dict[str, Any]) -> list[tuple]:
    rows = [
        ("name", _plain(found["name"])),
        ("architecture", _plain(found["architecture"])),
        ("weights", _count(found["weights"]).strip()),
    ]
    if found["layout"]:
        rows.append(("kv_b layout", found["layout"]))
    config = found["config"]
    if config is None:
        prefix = f"{found['architecture']}."
        return rows + [
            (_plain(key.removeprefix(prefix)), _plain(value))
            for key, value in found["metadata"].items()
            if key.startswith(prefix)
        ]
    moe = config["num_hidden_layers"] - config["first_k_dense_replace"]
    rows += [
        ("context", f"{config['context_length']:,} tokens"),
        ("vocabulary", f"{config['vocab_size']:,} tokens"),
        ("layers", f"{config['num_hidden_layers']}, of them {moe} with experts"),
        ("hidden size", f"{config['hidden_size']}, dense feed-forward {config['intermediate_size']}"),
        ("heads", f"{config['num_attention_heads']}, sizes {_head_sizes(config)}"),
        ("ranks", f"queries {config['q_lora_rank'] or 'none'}, keys and values {config['kv_lora_rank']}"),
    ]
    if moe:
        rows += [("experts", _experts(config)), ("routing", _routing(config))]
    return [*rows, ("rope", _rope(config))]


def _head_sizes(config: dict[str, Any]) -> str:
    return "nope {qk_nope_head_dim}, rope {qk_rope_head_dim}, v {v_head_dim}".format(**config)


def _experts(config: dict[str, Any]) -> str:
    return (
        "{num_experts_per_tok} of {n_routed_experts} and {n_shared_experts} shared, size {moe_intermediate_size}"
    ).format(**config)


def _routing(config: dict[str, Any]) -> str:
    words = [config["scoring_func"]]
    if config["n_group"] > 1:
        score = {"max": "best", "top2": "two best"}[config["group_score"]]
        words.append(f"{config['topk_group']} of {config['n_group']} groups by their {score}")
    if config["norm_topk_prob"]:
        words.append("normalised")
    if config["routed_scaling_factor"] != 1:
        words.append(f"scaled by {config['routed_scaling_factor']:g}")
    return ", ".join(words)


def _rope(config: dict[str, Any]) -> str:
    yarn = config["yarn"]
    text = f"theta {config['rope_theta']:g}, softmax scale {config['softmax_scale']:.4f}"
    return text if yarn is None else f"{text}, YaRN {yarn['factor']:g} × {yarn['original_context_length']}"


def _tokenizer_rows(tokenizer: dict[str, Any]) -> list[tuple]:
    rows = [
        ("model", f"{_plain(tokenizer['model'])}, pre-tokenizer {_plain(tokenizer['pre'])}"),
        ("tokens", f"{_count_or_none(tokenizer['tokens'])}, merges {_count_or_none(tokenizer['merges'])}"),
    ]
    for name, special in tokenizer["special"].items():
        token = "(not in the vocabulary)" if special["token"] is None else _plain(special["token"])
        rows.append((_plain(name), f"{_plain(special['id'])} {token}"))
    if tokenizer["ends_of_text"] is not None:
        ends = [f"{end['id']} {_plain(end['token'])}" for end in tokenizer["ends_of_text"]]
        rows.append(("ends a text", ", ".join(ends) or "nothing"))
    added = [name for name in ("bos", "eos") if tokenizer[f"add_{name}"] is True]
    yes = "yes" if tokenizer["chat_template"] else "no"
    rows += [
        ("adds", " and ".join(added) or "nothing"),
        ("chat template", ", ".join([yes, *map(_plain, tokenizer["chat_templates"])])),
    ]
    return rows


def _show_memory(page: _Page, memory: dict[str, Any], context_length: int) -> None:
    rows = [
        ("weights, mapped from the file", size_text(memory["weights"])),
        ("k_b, derived at load", size_text(memory["derived"])),
        (f"scratch, prompts in slices of {memory['scratch_tokens']}", size_text(memory["scratch"])),
        ("program", size_text(memory["process"])),
        ("available on this machine", size_text(memory["available"])),
    ]
    page.table("Memory", rows=rows, numbers=(1,))
    rows = [
        (cache_type, size_text(nbytes), size_text(memory["cache_at_context_length"][cache_type]))
        for cache_type, nbytes in memory["cache_per_1000_tokens"].items()
    ]
    page.table("Cache", "type", "1,000 tokens", f"{context_length:,} tokens", rows=rows, numbers=(1, 2))
    contexts = [f"{each['context']:,} tokens" for each in memory["gpu"]]
    rows = [
        (name, *(size_text(each[key]) for each in memory["gpu"]))
        for key, name in (("all", "everything"), ("cpu_moe", "without routed experts (--cpu-moe)"))
    ]
    page.table("On a GPU, cache q8_0", "what", *contexts, rows=rows, numbers=tuple(range(1, len(contexts) + 1)))


def _show_costs(page: _Page, step_costs: list[dict[str, Any]]) -> None:
    rows = []
    for cost in step_costs:
        prompt, generation = cost["prompt"], cost["generation"]
        rows.append(
            (
                f"{cost['context']:,}",
                f"{_count(prompt['macs'])}MAC",
                size_text(prompt["bytes"]),
                f"{_count(generation['macs'])}MAC",
                size_text(generation["bytes"]),
                f"{generation['cache_share']:.0%}",
            )
        )
    page.table(
        f"Cost per token; prompts in steps of {PROMPT_TOKENS}, cache q8_0",
        "context",
        "prompt",
        "reads",
        "generated",
        "reads",
        "of it cache",
        rows=rows,
        numbers=(0, 1, 2, 3, 4, 5),
    )


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} "


def _count_or_none(number: int | None) -> str:
    return "none" if number is None else f"{number:,}"


def _plain(value: Any, longest: int = 60) -> str:
    """A value from the file on one line, without control characters."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return f"array of {value['length']}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return one_line(text, longest)


EXAMPLES = """\b
Examples:
  pymla inspect model.gguf
  pymla inspect model-00001-of-00004.gguf --tensors
  pymla inspect model.gguf --json | jq .memory
  pymla inspect model.gguf --check-tensors
"""


@click.command(epilog=EXAMPLES)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@check_tensors_option
@click.option("--json", "as_json", is_flag=True, help="Print everything, tensors and metadata included, as JSON.")
def inspect(file: Path, tensors: bool, check_tensors: bool, as_json: bool) -> None:
    """Show what the GGUF file FILE holds, and what it takes to run it.

    Any part of a split file stands for all of them. Works for files that pymla cannot run, too, and says why.
    """
    with Terminal() as terminal:
        found = report(ModelFile.open(file), check_tensors, terminal.checking)
    if as_json:
        write_json(found, indent=2)
    else:
        _show(found, tensors)
