"""The result and the speed of a generation, for people and as JSON."""

import dataclasses
from typing import Any

from pymla.engine.costs import token_bytes
from pymla.engine.generation import Generation
from pymla.engine.language_model import LanguageModel
from pymla.host.memory import streaming_read


def as_json(language_model: LanguageModel, generation: Generation, text: str) -> dict[str, Any]:
    """A generation of which `text` came out, as values that JSON can hold."""
    stats = dataclasses.asdict(generation.stats) | {
        "prompt_tokens_per_second": generation.stats.prompt_rate,
        "generated_tokens_per_second": generation.stats.generation_rate,
        "memory_bound": _share(language_model, generation),
    }
    report: dict[str, Any] = {
        "model": str(language_model.file.path),
        "device": language_model.device,
        "text": text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "stats": stats,
    }
    if generation.draft_counts:
        report["speculation"] = dataclasses.asdict(generation.draft_counts)
    if generation.params.logprobs:
        report["logprobs"] = [
            {"token": s.token, "logprob": s.logprob, "top": [{"token": t, "logprob": p} for t, p in s.alternatives]}
            for s in generation.sampled
        ]
    return report


def as_line(language_model: LanguageModel, generation: Generation) -> str:
    """Speed and memory of a generation on one line."""
    stats, cache = generation.stats, language_model.model.cache
    share, drafts = _share(language_model, generation), generation.draft_counts
    return (
        f"prompt {stats.prompt_tokens} tokens, {stats.prompt_rate:.1f} tokens/s | "
        f"generated {stats.generated_tokens}, {stats.generation_rate:.1f} tokens/s"
        + (f", {share:.0%} of the memory bound" if share else "")
        + f" | cache {stats.cache_tokens} tokens, {stats.cache_tokens * cache.row_bytes / (1 << 20):.1f} MiB"
        + (f" | drafts: {drafts.accepted} of {drafts.drafted} tokens accepted" if drafts else "")
        + (" | interrupted" if generation.finish_reason == "interrupted" else "")
    )


def _share(language_model: LanguageModel, generation: Generation) -> float:
    """Bytes read per second while generating, as a share of the rate at which this machine streams from memory; 0 where
    too little was generated, a GPU computed, or an interrupt leaves no time to measure."""
    model, interrupted = language_model.model, generation.finish_reason == "interrupted"
    on_host = all(backend.IN_HOST_MEMORY for backend in model.placement.backends)
    if interrupted or generation.stats.generated_tokens < 2 or not on_host:
        return 0.0
    each = token_bytes(
        language_model.config,
        language_model.file.tensors,
        max(1, generation.stats.cache_tokens),
        cache_type=model.cache.cache_type,
        mla=model.mla,
    )
    return each * generation.stats.generation_rate / streaming_read()
