"""From a file to a model that generates: checks, memory plan, placement, weights, kernels."""

import importlib.resources
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymla import checks
from pymla.engine.devices import DEVICES, placement
from pymla.engine.filecheck import examine
from pymla.engine.fitting import fit
from pymla.engine.forms import MLA_MODES
from pymla.engine.language_model import LanguageModel
from pymla.engine.model import Model
from pymla.engine.planning import Planner, Wish
from pymla.engine.report import Report, as_report
from pymla.engine.split import Split
from pymla.files.gguf_reader import ModelFile
from pymla.host.memory import available_memory
from pymla.models.nextn import with_nextn
from pymla.models.placement import Placement
from pymla.models.weights import Weights
from pymla.pages import CACHE_TYPES, PAGE
from pymla.text.recommended import recommended_sampling

#: Slots of a cache are numbers of 32 bits.
MOST_SLOTS = (1 << 31) - PAGE


def demo_path() -> Path:
    """The small model that is part of the package: DeepSeek-V2's architecture, trained on Python's standard library."""
    return Path(str(importlib.resources.files("pymla") / "demo.gguf"))


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    gpu_layers: int | str | None = None,
    cpu_moe: bool = False,
    cache_type: str = "q8_0",
    mla: str | int = "auto",
    dsa: bool = True,
    nextn: bool = False,
    threads: int | None = None,
    ctx: int | None = None,
    cache_tokens: int | None = None,
    check_tensors: bool = False,
    overrides: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> LanguageModel:
    """Load a model.

    Parameters
    ----------
    path : str or Path, optional
        A GGUF file, or any part of a split one; the demo model by default.
    device : str
        "cuda": Numba kernels on an NVIDIA GPU; "cpu": on the processor; "auto": on the GPU where there is one;
        "reference": NumPy, slow, for comparison.
    gpu_layers : int or "all", optional
        How many of the last layers go to the GPU; with more than the model has, the output matrix, too. By default as
        much of the model as fits.
    cpu_moe : bool
        Routed experts stay with the CPU.
    cache_type : str
        One of `pymla.pages.CACHE_TYPES`: "f32", "f16", "bf16", "q8_0", "q6_0", "q5_0" or "q4_0". The last three are for
        the latent rows of all modes but "0".
    mla : str
        "auto", "0", "1", "2" or "3" (`pymla.engine.forms.MLA_MODES`).
    dsa : bool
        Whether the attention of models with an indexer is sparse, as they were trained; otherwise they attend to all
        positions, and the indexer is left out.
    nextn : bool
        Whether the block that predicts further tokens is loaded, which files of V3, V3.2 and GLM may have
        (`pymla.models.nextn`); of several the first.
    threads : int, optional
        All usable cores by default.
    ctx : int, optional
        Tokens of the longest sequence. By default the model's context length, cut to what the memory holds.
    cache_tokens : int, optional
        Tokens that the cache holds for all sequences together, each in whole pages of 64; `ctx` by default, and never
        fewer.
    check_tensors : bool
        Read the whole file first, and refuse it for NaN, infinity or holes in any tensor (`pymla.engine.filecheck`).
    overrides : dict of str and int, float, bool or str, optional
        Metadata that counts in place of the file's own, as ``{"deepseek2.expert_used_count": 4}``.
    report : Report, optional
        Told of progress and warnings.

    Returns
    -------
    LanguageModel

    Raises
    ------
    PymlaError
        The file cannot be run, the memory does not suffice, or there is no such device.
    """
    report = as_report(report)
    checks.choice("device", device, DEVICES)
    checks.choice("cache_type", cache_type, CACHE_TYPES)
    mode = checks.choice("mla", str(mla) if isinstance(mla, int) else mla, MLA_MODES)
    threads = None if threads is None else checks.integer("threads", threads, 1)
    ctx = None if ctx is None else checks.integer("ctx", ctx, 1)
    cache_tokens = 1 if cache_tokens is None else checks.integer("cache_tokens", cache_tokens, 1, MOST_SLOTS)
    check_tensors, dsa = checks.flag("check_tensors", check_tensors), checks.flag("dsa", dsa)
    nextn = checks.flag("nextn", nextn)
    wish = Wish(ctx, _layer_count(gpu_layers), checks.flag("cpu_moe", cpu_moe))
    file = ModelFile.open(
        demo_path() if path is None else checks.path("path", path, "the path of a GGUF file is expected"), overrides
    )
    options = {"dsa": dsa, "nextn": nextn, "check_tensors": check_tensors}
    config, tokenizer = examine(file, cache_type, mode, progress=report.checking, **options).check()
    config = with_nextn(config, file.tensors) if nextn else config
    recommended = recommended_sampling(file)
    for warning in (*tokenizer.warnings, *recommended.warnings):
        report.warn(warning)
    if ctx is not None and ctx > config.context_length:
        checks.refuse("ctx", ctx, f"this model's context goes from 1 to {config.context_length} tokens")
    planner = Planner(config, file, cache_type, mode, cache_tokens, nextn)
    split, ctx = fit(device, wish, planner, report)
    place = placement(device, split, config, threads, report)
    weights = _weights(planner, place, split, report)
    room = max(ctx, cache_tokens)
    model = Model(config, weights, place, cache_type=cache_type, mla=mode, ctx=ctx, cache_tokens=room)
    for backend in place.backends:
        backend.compile_for(model, report.compiling, report.warn)
    return LanguageModel(file, config, tokenizer, model, recommended.values)


def _layer_count(gpu_layers: Any) -> int | None:
    """`gpu_layers` as a number; "all" is more than any model has."""
    if gpu_layers is None:
        return None
    if isinstance(gpu_layers, str):
        if gpu_layers == "all":
            return sys.maxsize
        checks.refuse("gpu_layers", gpu_layers, "a whole number from 1 on, or all, is expected")
    return checks.integer("gpu_layers", gpu_layers, 1)


def _weights(planner: Planner, place: Placement, split: Split, report: Report) -> Weights:
    """The weights, on their way to the memory of their backends."""
    file, config = planner.file, planner.config
    on_device, on_host = planner.device(split, 1), planner.host(split, 1)
    if on_host.weights <= available_memory():
        file.prefault(report.reading, planner.read(split))
    total = on_device.weights + on_device.derived
    if planner.interleaved:
        from pymla.models import interleaved

        interleaved.compile_kernel(report.compiling, report.warn)
    # Two progress bars at a time would take turns.
    arranging = None if total else report.arranging
    return Weights.from_gguf(
        file, config, arranging, place, lambda done: report.uploading(done, total), nextn=planner.nextn
    )
