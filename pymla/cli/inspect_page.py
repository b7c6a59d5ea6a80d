"""The report on a model file as tables, for people."""

from typing import Any

from pymla.cli.inspect_report import PROMPT_TOKENS
from pymla.cli.page import Page
from pymla.host.memory import size_text
from pymla.printable import one_line

_MOST_PROBLEMS = 10  # that are shown


def show(found: dict[str, Any], tensors: bool) -> None:
    """Print a report of `pymla.cli.inspect_report.report`, with a list of all tensors if that is asked for."""
    page = Page()
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
                _type(entry),
                entry["tensors"],
                _count(entry["weights"]).strip(),
                size_text(entry["bytes"]),
            )
            for entry in found["types"]
        ]
        page.table("Types", "type", "tensors", "weights", "size", rows=rows, numbers=(1, 2, 3))
    if found["tokenizer"]:
        page.table("Tokenizer", rows=_tokenizer_rows(found["tokenizer"]))
    if any(found["sampling"].values()):
        page.table("Sampling that the file recommends", rows=_sampling_rows(**found["sampling"]))
    if found["overridden"]:
        page.table("Overridden metadata", "key", "value", "in the file", rows=_overridden_rows(found))
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


def _sampling_rows(recommended: dict[str, float | str], warnings: list[str]) -> list[tuple[Any, ...]]:
    rows = [(name, value if isinstance(value, str) else f"{value:g}") for name, value in recommended.items()]
    return rows + [("warning", _plain(warning, 1000)) for warning in warnings]


def _overridden_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (_plain(key), _plain(found["metadata"][key]), "nothing" if value is None else _plain(value))
        for key, value in found["overridden"].items()
    ]


def _type(entry: dict[str, Any]) -> str:
    """A type, and what becomes of it."""
    if not entry["supported"]:
        return f"{entry['type']} (not run)"
    return entry["type"] if entry["loaded_as"] == entry["type"] else f"{entry['type']} (loaded as {entry['loaded_as']})"


def _file_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    parts = f" in {len(found['parts'])} parts" if len(found["parts"]) > 1 else ""
    return [
        ("path", _plain(found["path"], 1000)),
        ("size", size_text(found["bytes"]) + parts),
        ("format", f"GGUF {found['version']}, {len(found['metadata'])} keys, {len(found['tensors'])} tensors"),
    ]


def _model_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
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
        *([("nextn layers", _nextn(found["nextn"]))] if found["nextn"] else []),
        ("hidden size", f"{config['hidden_size']}, dense feed-forward {config['intermediate_size']}"),
        ("heads", f"{config['num_attention_heads']}, sizes {_head_sizes(config)}"),
        ("ranks", f"queries {config['q_lora_rank'] or 'none'}, keys and values {config['kv_lora_rank']}"),
    ]
    if config["indexer"]:
        rows.append(("sparse attention", _indexer(config["indexer"])))
    if moe:
        rows += [("experts", _experts(config)), ("routing", _routing(config))]
    return [*rows, ("rope", _rope(config))]


def _nextn(nextn: dict[str, Any]) -> str:
    """What becomes of layers that predict further tokens."""
    if not nextn["tensors"]:
        return f"{nextn['layers']}, which the file does not hold"
    text = f"{nextn['layers']}, not loaded: {nextn['tensors']} tensors, {size_text(nextn['bytes'])}"
    missing = len(nextn["missing"])
    return f"{text}; {missing} missing" if missing else text


def _head_sizes(config: dict[str, Any]) -> str:
    return "nope {qk_nope_head_dim}, rope {qk_rope_head_dim}, v {v_head_dim}".format(**config)


def _indexer(indexer: dict[str, Any]) -> str:
    full = sum(indexer["full"])
    text = "the best {top_k:,} positions, by {heads} heads of {head_dim}".format(**indexer)
    return text if full == len(indexer["full"]) else f"{text} in {full} of {len(indexer['full'])} layers"


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
    yarn, temperature = config["yarn"], config["attention_temperature"]
    words = [f"theta {config['rope_theta']:g}", f"softmax scale {config['softmax_scale']:.4f}"]
    if yarn is not None:
        words.append(f"YaRN {yarn['factor']:g} × {yarn['original_context_length']}")
    if config["rope_linear_factor"] != 1:
        words.append(f"linear {config['rope_linear_factor']:g}")
    if temperature is not None:
        words.append("temperature {scale:g} from {length} on".format(**temperature))
    return ", ".join(words)


def _tokenizer_rows(tokenizer: dict[str, Any]) -> list[tuple[Any, ...]]:
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


def _show_memory(page: Page, memory: dict[str, Any], context_length: int) -> None:
    rows = [
        ("weights, mapped from the file", size_text(memory["weights"])),
        ("k_b, derived at load", size_text(memory["derived"])),
        *([("plain copies of interleaved weights", size_text(memory["plain"]))] if memory["plain"] else []),
        (f"scratch, prompts in slices of {memory['scratch_tokens']}", size_text(memory["scratch"])),
        ("program", size_text(memory["process"])),
        *([("nextn layers, not loaded", size_text(memory["not_run"]))] if memory["not_run"] else []),
        ("available on this machine", size_text(memory["available"])),
    ]
    page.table("Memory", rows=rows, numbers=(1,))
    caches = [
        (cache_type, size_text(nbytes), size_text(memory["cache_at_context_length"][cache_type]))
        for cache_type, nbytes in memory["cache_per_1000_tokens"].items()
    ]
    page.table("Cache", "type", "1,000 tokens", f"{context_length:,} tokens", rows=caches, numbers=(1, 2))
    contexts = [f"{each['context']:,} tokens" for each in memory["gpu"]]
    totals = [
        (name, *(size_text(each[key]) for each in memory["gpu"]))
        for key, name in (("all", "everything"), ("cpu_moe", "without routed experts (--cpu-moe)"))
    ]
    page.table("On a GPU, cache q8_0", "what", *contexts, rows=totals, numbers=tuple(range(1, len(contexts) + 1)))


def _show_costs(page: Page, step_costs: list[dict[str, Any]]) -> None:
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
