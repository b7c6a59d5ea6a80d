"""What a step of a whole model takes at least on a card, by arithmetic: ``python bench/gpu.py --analytic``.

Bytes and multiply-adds are those of `pymla.engine.costs`. Launches are counted: small models of the same structure run
in the simulator, which this module therefore needs (``NUMBA_ENABLE_CUDASIM=1``).
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from gpu_models import CTX, PROMPT, SHAPE, SMALL
from make_model import make_model, model_tensors
from model_mixes import uniform

import pymla
from pymla import ggml
from pymla.engine import costs
from pymla.scratch import DEVICE

#: Cards: bytes per second, and int8 multiply-adds per second of dense matrices, as their data sheets say (SXM).
CARDS = {"H100": (3.35e12, 1979e12 / 2), "H200": (4.8e12, 1979e12 / 2)}
#: Of the table's columns.
WIDTHS = (5, 11, 6, 8, 6, 8, 8, 8, 9, 7)


def table(bandwidth, int8, gap, launch):
    """Lines: the time that steps of V2-Lite in Q4_0 take at least, on cards or with figures that are given.

    Parameters
    ----------
    bandwidth, int8 : float or None
        TB/s, and TOP/s of dense int8; those of `CARDS` by default.
    gap, launch : float
        µs from launch to launch in a graph, and of a launch from Python.
    """
    cards = dict(CARDS)
    if bandwidth or int8:
        default = CARDS["H200"]
        cards = {"given": ((bandwidth or default[0] / 1e12) * 1e12, (int8 or default[1] * 2e-12) * 1e12 / 2)}
    with tempfile.TemporaryDirectory() as folder:
        counts, config = count_launches(Path(folder))
    # Sizes have the same names in both.
    sizes = {each.name for each in dataclasses.fields(config)} & {each.name for each in dataclasses.fields(SHAPE)}
    config = dataclasses.replace(config, **{name: getattr(SHAPE, name) for name in sizes})
    tensors = {each.name: each for each in model_tensors(SHAPE, "kv_b", uniform(ggml.Q4_0, ggml.Q6_K), 0)}
    yield f"DeepSeek-V2-Lite, Q4_0, f16 cache; {gap} µs from launch to launch in a graph, {launch} µs from Python"
    yield _line("card", "step", "N_KV", "MiB read", "GMAC", "launches", "least ms", "graph ms", "Python ms", "t/s")
    yield _line(*("-" * (width - 1) + ":" for width in WIDTHS))
    for card, (read, macs) in cards.items():
        for step, new in (("generation", 1), (f"prompt {PROMPT}", PROMPT)):
            for depth in (0, 4096, CTX - PROMPT):
                ops = costs.step_ops(config, tensors, new, depth + new, cache_type="f16")
                least, launches = costs.least_seconds(ops, read, macs), counts[new]
                # Prompts are not recorded; the host runs ahead as long as kernels take longer than their launch.
                graph, python = least + launches * gap * 1e-6, max(least, launches * launch * 1e-6)
                mib, gmac = sum(op.nbytes for op in ops) / (1 << 20), sum(op.macs for op in ops) / 1e9
                yield _line(
                    card,
                    step,
                    depth,
                    f"{mib:.0f}",
                    f"{gmac:.0f}",
                    launches,
                    f"{least * 1e3:.2f}",
                    f"{graph * 1e3:.2f}" if new == 1 else "-",
                    f"{python * 1e3:.2f}",
                    f"{new / (graph if new == 1 else python):.0f}",
                )


def _line(*cells):
    """A row of the table."""
    return f"| {' | '.join(f'{cell:>{width}}' for cell, width in zip(cells, WIDTHS, strict=True))} |"


def count_launches(folder):
    """Kernels that steps of V2-Lite launch, by their tokens: 1 or `PROMPT`. Counted in the simulator on small models of
    two and three layers, whose steps are made of the same kernels, with a slice of a prompt as part of one.

    Returns
    -------
    dict, and the configuration of a small model
    """
    from pymla.cuda.runtime import simulator

    found, launch, count = {}, simulator.launch, [0]

    def counted(*arguments):
        count[0] += 1
        launch(*arguments)

    simulator.launch = counted
    try:
        for layers in (2, 3):
            path = make_model(folder / f"{layers}.gguf", SMALL, layers=layers, qtype=ggml.Q4_0)
            with pymla.load(path, device="cuda", cache_type="f16", ctx=512) as loaded:
                model = loaded.model
                sequence = model.new_sequence()
                # More tokens than experts times pairs for rows, so that experts go in tiles; the others are few.
                for tokens, new in ((PROMPT, 12), (1, 1)):
                    count[0] = 0
                    model.forward([(sequence, np.arange(new, dtype=np.int32))])
                    found[tokens, layers] = count[0]
    finally:
        simulator.launch = launch
    slices, all_layers = {1: 1, PROMPT: PROMPT // DEVICE.tokens}, SHAPE.num_hidden_layers
    counts = {
        tokens: found[tokens, 2] + (all_layers - 2) * slices[tokens] * (found[tokens, 3] - found[tokens, 2])
        for tokens in slices
    }
    return counts, loaded.config
