"""The contents of a model file, and the memory and work that it needs, as values that JSON can hold."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pymla import ggml
from pymla.engine import costs
from pymla.engine.cache_layout import cache_bytes, row_bytes
from pymla.engine.filecheck import Examined, examine
from pymla.engine.planning import LEAST_CTX, Planner
from pymla.engine.split import Split
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.host.memory import available_memory
from pymla.models.config import ModelConfig
from pymla.models.tensors import is_run, layer_of, nextn_tensors
from pymla.pages import CACHE_TYPES
from pymla.scratch import HOST
from pymla.text.recommended import recommended_sampling
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


def report(
    file: ModelFile, check_tensors: bool = False, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """The report of ``pymla inspect``; arguments as for `pymla.engine.filecheck.examine`.

    Files that the engine cannot run are reported, too: ``runs`` says whether `pymla.load` takes the file, ``problems``
    why not. ``config``, ``memory`` and ``costs`` are None where they cannot be known.
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
        "nextn": None if config is None else _nextn(config, file),
        "types": _types(file),
        "tokenizer": _tokenizer(file, found.tokenizer),
        "sampling": _sampling(file),
        "memory": memory,
        "costs": step_costs,
        "metadata": {key: _json(value) for key, value in file.metadata.items()},
        "overridden": {key: _json(value) for key, value in file.overridden.items()},
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


def _nextn(config: ModelConfig, file: ModelFile) -> dict[str, Any] | None:
    """The layers that predict further tokens, which are not loaded: how many the metadata declares, and what the file
    holds of them. None where there are none."""
    present = {
        name: tensor for name, tensor in file.tensors.items() if (layer_of(name) or 0) >= config.num_hidden_layers
    }
    declared = config.num_nextn_predict_layers
    if not declared and not present:
        return None
    layers = range(config.num_hidden_layers, config.num_hidden_layers + declared)
    wanted = {spec.name for layer in layers for spec in nextn_tensors(config, layer, file.tensors)}
    return {
        "layers": declared,
        "tensors": len(present),
        "bytes": sum(tensor.data.nbytes for tensor in present.values()),
        "missing": sorted(wanted - present.keys()) if present else [],
    }


def _sampling(file: ModelFile) -> dict[str, Any]:
    """The sampling parameters that the file recommends, and what of them is not followed."""
    recommended = recommended_sampling(file)
    warnings = [warning.removeprefix(f"{file.path}: ") for warning in recommended.warnings]
    return {"recommended": recommended.values, "warnings": warnings}


def _types(file: ModelFile) -> list[dict[str, Any]]:
    """Counts by type, most bytes first."""
    types: dict[int, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        entry = types.setdefault(
            tensor.qtype,
            {
                "type": ggml.NAME[tensor.qtype],
                "loaded_as": ggml.NAME[ggml.plain_type(tensor.qtype)],
                "tensors": 0,
                "weights": 0,
                "bytes": 0,
                "supported": is_run(tensor.qtype),
            },
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
        "plain": plan.plain,
        "scratch": plan.scratch,
        "scratch_tokens": HOST.tokens,
        "process": plan.process,
        "not_run": planner.in_file(planner.not_run),
        "available": available_memory(),
        "cache_per_1000_tokens": {cache_type: 1000 * nbytes for cache_type, nbytes in rows.items()},
        "cache_at_context_length": {
            cache_type: cache_bytes(config, cache_type, "auto", config.context_length) for cache_type in rows
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
