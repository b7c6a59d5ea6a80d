"""Draw docs/architecture.png: the layers of the package, and the way of a token through them.

The background is opaque, so that the picture reads alike on light and dark pages.

    python tools/draw_architecture.py
"""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

TARGET = Path(__file__).parents[1] / "docs" / "architecture.png"

PAPER, INK, FAINT = "#fbfbf8", "#22252b", "#6b717c"
GREY, BLUE, GREEN, SAND, ROSE = "#e6e8ec", "#d3e2f4", "#d8ecd9", "#f5e6c8", "#f4d8d8"

#: Layers above the backends, from the top: name, folders, colour.
LAYERS = [
    ("command line", "cli/   one file for each command", GREY),
    ("measuring, making", "measure/   the sweep      make/   conversion of checkpoints", GREY),
    ("engine", "engine/   loading · memory plan · cache · forward pass · recorded steps", BLUE),
    ("models", "models/   configuration · weights by name · deepseek2.py, the transformer", GREEN),
]
BACKENDS = [
    ("reference/", "NumPy, float32\nor float64: the\ndefinition"),
    ("cpu/", "Numba, from AMX\nto portable\nvector code"),
    ("cuda/", "Numba-CUDA,\ntensor cores,\nor simulated"),
]
FOLDERS = "cpu and cuda:  attention/   formats/   matmul/   machine/   runtime/"
#: Layers below the backends.
GROUND = [
    ("text, files, host", "text/   tokenizer, sampling      files/   GGUF      host/   cores, memory", BLUE),
    ("operations and types", "backend.py, contract.py: every operation      pages.py  tensor.py  ggml.py", SAND),
]

#: Stages of a layer: text, and the shape of the result.
STAGES = [
    ("norm", "(T, hidden), as int8 codes and scales", GREEN),
    ("W_q: queries, rotated", "(T, H, nope + R)", GREEN),
    ("W_kv_a: c_kv normalised, k_pe rotated", "(T, rank) and (T, R)", GREEN),
    ("attention over the sequence's pages", "(T, H, v)", SAND),
    ("W_o, added to the residual", "(T, hidden)", GREEN),
    ("norm, router: k of E experts", "ids and weights (T, k)", GREEN),
    ("experts and shared experts, added", "(T, hidden)", SAND),
]


def box(axes, x, y, width, height, colour, edge=INK):
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=edge, linewidth=0.9)
    )


def arrow(axes, start, end, bend=0.0, colour=INK):
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.1)
    )


def draw_layer(axes, y, layer):
    name, folders, colour = layer
    box(axes, 0, y, 6.6, 0.84, colour)
    axes.text(0.2, y + 0.57, name, fontsize=11, weight="bold", color=INK, va="center")
    axes.text(0.2, y + 0.24, folders, fontsize=8.4, color=INK, va="center")


def draw_layers(axes):
    """What imports what."""
    axes.text(0, 10.45, "Layers", fontsize=14, weight="bold", color=INK)
    axes.text(0, 10.12, "a module imports from its own layer and from those below", fontsize=9.5, color=FAINT)
    y = 9.06
    for layer in LAYERS:
        draw_layer(axes, y, layer)
        arrow(axes, (3.3, y), (3.3, y - 0.28))
        y -= 1.12
    top = y + 0.84
    box(axes, 0, top - 2.2, 6.6, 2.2, PAPER, FAINT)
    axes.text(0.2, top - 0.25, "backends", fontsize=11, weight="bold", color=INK, va="center")
    axes.text(6.4, top - 0.25, "never import each other", fontsize=8.4, color=FAINT, va="center", ha="right")
    for i, (name, text) in enumerate(BACKENDS):
        x = 0.2 + 2.1 * i
        box(axes, x, top - 1.78, 2.0, 1.28, ROSE)
        axes.text(x + 0.14, top - 0.73, name, fontsize=10, weight="bold", color=INK, va="center")
        axes.text(x + 0.14, top - 1.29, text, fontsize=8.2, color=INK, va="center", linespacing=1.3)
    axes.text(0.2, top - 2.0, FOLDERS, fontsize=8.4, color=INK, va="center")
    y = top - 2.2
    for layer in GROUND:
        arrow(axes, (3.3, y), (3.3, y - 0.28))
        y -= 1.12
        draw_layer(axes, y, layer)


def draw_token(axes):
    """From text to text."""
    left, width = 8.1, 5.3
    axes.text(left, 10.45, "The way of a token", fontsize=14, weight="bold", color=INK)
    axes.text(left, 10.12, "T new tokens of a step, of one or several sequences", fontsize=9.5, color=FAINT)
    box(axes, left, 9.3, width, 0.6, BLUE)
    axes.text(left + 0.2, 9.6, "text → chat template → tokenizer", fontsize=9.5, color=INK, va="center")
    axes.text(left + width - 0.2, 9.6, "ids (T,)", fontsize=8.4, color=FAINT, va="center", ha="right")
    arrow(axes, (left + width / 2, 9.3), (left + width / 2, 9.02))
    box(axes, left, 8.42, width, 0.6, GREEN)
    axes.text(left + 0.2, 8.72, "embedding", fontsize=9.5, color=INK, va="center")
    axes.text(left + width - 0.2, 8.72, "residual (T, hidden)", fontsize=8.4, color=FAINT, va="center", ha="right")
    arrow(axes, (left + width / 2, 8.42), (left + width / 2, 8.14))
    bottom, step = 2.24, 0.78
    box(axes, left - 0.2, bottom, width + 0.4, 8.14 - bottom, PAPER, FAINT)
    axes.text(left, 7.93, "each layer", fontsize=9, weight="bold", color=FAINT, va="center")
    y = 7.13
    centres = []
    for text, shape, colour in STAGES:
        box(axes, left, y, width, 0.6, colour)
        axes.text(left + 0.2, y + 0.4, text, fontsize=9.3, color=INK, va="center")
        axes.text(left + 0.2, y + 0.16, shape, fontsize=8, color=FAINT, va="center")
        centres.append(y + 0.3)
        y -= step
    for upper, lower in itertools.pairwise(centres):
        arrow(axes, (left + width / 2, upper - 0.3), (left + width / 2, lower + 0.3))
    cache = left + width + 0.85
    box(axes, cache, centres[3] - 0.45, 1.75, centres[2] - centres[3] + 0.9, BLUE)
    middle = (centres[2] + centres[3]) / 2
    centred = {"color": INK, "va": "center", "ha": "center"}
    axes.text(cache + 0.87, middle + 0.33, "paged cache", fontsize=9.3, weight="bold", **centred)
    pages = "pages of 64 tokens\nblock table for\neach sequence"
    axes.text(cache + 0.87, middle - 0.2, pages, fontsize=8, linespacing=1.3, **centred)
    arrow(axes, (left + width, centres[2]), (cache, centres[2]))
    arrow(axes, (cache, centres[3]), (left + width, centres[3]))
    for y, text in ((centres[2] + 0.12, "store"), (centres[3] - 0.25, "read")):
        axes.text(left + width + 0.48, y, text, fontsize=8, color=FAINT, ha="center")
    arrow(axes, (left + width / 2, bottom), (left + width / 2, 1.96))
    box(axes, left, 1.36, width, 0.6, GREEN)
    axes.text(left + 0.2, 1.66, "norm, output matrix", fontsize=9.5, color=INK, va="center")
    axes.text(left + width - 0.2, 1.66, "logits (sequences, V)", fontsize=8.4, color=FAINT, va="center", ha="right")
    arrow(axes, (left + width / 2, 1.36), (left + width / 2, 1.08))
    box(axes, left, 0.48, width, 0.6, BLUE)
    axes.text(left + 0.2, 0.78, "sampler → token → text", fontsize=9.5, color=INK, va="center")
    axes.text(left + width - 0.2, 0.78, "until the text ends", fontsize=8.4, color=FAINT, va="center", ha="right")
    right = left + width + 2.85
    axes.plot([left + width, right, right, left + width + 0.02], [0.78, 0.78, 8.72, 8.72], color=INK, lw=1.1)
    arrow(axes, (right, 8.72), (left + width, 8.72))
    axes.text(right - 0.15, 1.0, "the next token", fontsize=8, color=FAINT, ha="right")


def main():
    figure, axes = plt.subplots(figsize=(12.6, 8.4), facecolor=PAPER)
    draw_layers(axes)
    draw_token(axes)
    axes.set_xlim(-0.3, 16.6)
    axes.set_ylim(0.2, 10.9)
    axes.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01)
    figure.savefig(TARGET, dpi=130, facecolor=PAPER)
    Image.open(TARGET).convert("RGB").quantize(64).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
