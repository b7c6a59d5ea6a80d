"""A GGUF file of random weights in a real model's shape, to measure and test engines without the trained model.

Metadata and tensor names are those that llama.cpp's convert_hf_to_gguf.py writes, so that llama.cpp and ik_llama.cpp
load the file too. A seed gives the same model in all three kv_b layouts.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import gguf
import numpy as np
from model_mixes import MIXES, uniform
from model_shapes import PRESETS
from random_weights import normal, random_blocks

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import gguf_writer, outputs
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor, Value
from pymla.make.fallbacks import fitting_type, rows_apart
from pymla.make.mixes import Mix, Model, TensorInfo, Walk, walk_order
from pymla.make.model_metadata import LAYOUTS, Shape, model_metadata
from pymla.reference.formats import FORMATS, INTERLEAVED
from pymla.reference.quant import QUANTISERS, dequantise, quantise
from pymla.text.byte_alphabet import CHARACTERS

QTYPES = tuple(qtype for qtype in (*FORMATS, *INTERLEAVED) if qtype != ggml.IQ1_M_R1)  # which no file has
QTYPE_NAMES = tuple(ggml.NAME[t].lower() for t in QTYPES)

#: Makes the tensor of a name and shape; of a type and standard deviation of its own, if they are given.
MakeMatrix = Callable[..., NewTensor]
#: Makes the weight of a norm of a name and size.
MakeNorm = Callable[[str, int], NewTensor]


def make_model(
    path: str | Path,
    shape: str | Shape,
    *,
    layers: int | None = None,
    layout: str = "kv_b",
    qtype: int | str = ggml.Q4_0,
    output_type: int | str | None = None,
    mix: str | None = None,
    seed: int = 0,
    vocab: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a GGUF file of random weights.

    Weights have mean 0 and standard deviation 1/sqrt(columns), embeddings 1, so that activations keep the size they
    have in a trained model. Every tensor is drawn from its own generator, seeded by `seed` and the tensor's name.
    Memory stays bounded: the file is written in pieces of at most 8 MiB, or one layer's kv_b with the layouts that
    derive k_b and v_b from it. It appears under its name when it is complete.

    Parameters
    ----------
    path : file to write
    shape : a name in `PRESETS`, or a Shape
    layers : number of layers instead of the shape's
    layout : "kv_b", "split" (k_b and v_b, as llama.cpp writes now) or "all" (as ik_llama.cpp writes)
    qtype : type of the matrices; one that does not fit a matrix falls back to another (`fitting_type`)
    output_type : type of the output matrix; by default Q6_K where `qtype` is quantised, as real files have it
    mix : a name in `MIXES`, whose types count instead of `qtype` and `output_type`
    seed : any non-negative integer
    vocab : a GGUF file whose tokenizer is copied; by default a synthetic byte-level BPE
    progress : called with (bytes written, bytes in all)

    Returns
    -------
    Path

    Raises
    ------
    PymlaError
        An unknown preset, layout, type or mix; a type without random weights; a vocabulary larger than the shape's;
        not enough free disk.
    """
    shape = _resolve(shape, layers)
    if layout not in LAYOUTS:
        raise PymlaError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    types = _named_mix(mix) if mix else _uniform(shape, _type_id(qtype), output_type)
    tensors = list(model_tensors(shape, layout, types, seed))
    tokenizer = _copied_tokenizer(vocab, shape.vocab_size) if vocab else synthetic_tokenizer(shape.vocab_size)

    path = Path(path)
    outputs.check_space(path, sum(t.nbytes for t in tensors))
    with outputs.replacing(path) as part:
        metadata = model_metadata(shape, layout, types.file_type) | tokenizer
        gguf_writer.write(part, shape.architecture, metadata, tensors, progress)
    return path


def _resolve(shape: str | Shape, layers: int | None) -> Shape:
    if isinstance(shape, str):
        if shape not in PRESETS:
            raise PymlaError(f"unknown preset {shape!r}; choose {', '.join(PRESETS)}")
        shape = PRESETS[shape]
    if layers is not None:
        if layers < 1:
            raise PymlaError(f"a model needs at least one layer, not {layers}")
        types = shape.indexer_types and shape.indexer_types[:layers]
        shape = replace(shape, num_hidden_layers=layers, indexer_types=types)
    return shape


def _type_id(qtype: int | str) -> int:
    if isinstance(qtype, str):
        qtype = ggml.ID.get(qtype.upper(), qtype)
    if qtype not in QTYPES:
        raise PymlaError(
            f"no random weights of type {ggml.NAME.get(qtype, qtype)}; choose "
            + ", ".join(ggml.NAME[t].lower() for t in QTYPES)
        )
    return qtype


def _named_mix(name: str) -> Mix:
    if name not in MIXES:
        raise PymlaError(f"unknown mix {name!r}; choose {', '.join(MIXES)}")
    return MIXES[name]


def _uniform(shape: Shape, qtype: int, output_type: int | str | None) -> Mix:
    if output_type is None:
        output_type = qtype if ggml.plain_type(qtype) in ggml.FLOATS else ggml.Q6_K
    # k_b holds the weights of kv_b in every layout.
    k_type = fitting_type(qtype, (shape.kv_lora_rank, shape.qk_nope_head_dim))
    return uniform(qtype, _type_id(output_type), k_type if ggml.NAME[k_type] in QUANTISERS else ggml.Q8_0)


def _copied_tokenizer(path: str | Path, vocab_size: int) -> dict[str, Value]:
    """The ``tokenizer.*`` metadata of a GGUF file, tokens padded to `vocab_size`."""
    metadata = ModelFile.open(path).metadata
    tokenizer = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    tokens = tokenizer.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise PymlaError(f"{path}: no tokenizer.ggml.tokens; --vocab wants a GGUF file with a tokenizer")
    if len(tokens) > vocab_size:
        raise PymlaError(f"{path}: {len(tokens)} tokens, but the model's vocabulary holds {vocab_size}")
    missing = vocab_size - len(tokens)
    if missing:
        for key, filler in (("token_type", int(gguf.TokenType.UNUSED)), ("scores", 0)):
            values = tokenizer.get(f"tokenizer.ggml.{key}")
            if values is not None:
                tokenizer[f"tokenizer.ggml.{key}"] = np.append(values, np.full(missing, filler, values.dtype))
        tokenizer["tokenizer.ggml.tokens"] = [*tokens, *_padding(len(tokens), vocab_size)]
    return tokenizer


def _padding(start: int, stop: int) -> list[str]:
    return [f"[PAD{i}]" for i in range(start, stop)]


def synthetic_tokenizer(vocab_size: int) -> dict[str, Value]:
    """GGUF metadata of a byte-level BPE: 256 bytes, two special tokens, merges of two letters, and padding.

    Parameters
    ----------
    vocab_size : at least 258

    Raises
    ------
    PymlaError
        The vocabulary is too small for the bytes.
    """
    if vocab_size < 258:
        raise PymlaError(f"a vocabulary of {vocab_size} tokens is too small; a byte-level tokenizer needs 258")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [(left, right) for left in "Ġ" + letters for right in letters][: vocab_size - 258]
    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    tokens = [*CHARACTERS, *(left + right for left, right in pairs)]
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * 2
    bos = len(tokens)
    tokens += specials
    types += [gguf.TokenType.UNUSED] * (vocab_size - len(tokens))
    tokens += _padding(len(tokens), vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        # A GGUF array cannot be empty, and llama.cpp wants the key.
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs] or ["Ġ a"],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos + 1,
        "tokenizer.ggml.padding_token_id": bos + 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def model_tensors(s: Shape, layout: str, types: Mix, seed: int) -> Iterator[NewTensor]:
    """Every tensor of the file, in llama.cpp's order; weights are drawn when `NewTensor.pieces` is called."""
    matrices: list[TensorInfo] = []

    def ask(name: str, shape: tuple[int, ...]) -> int:
        matrices.append(TensorInfo(name, shape))
        return ggml.F32

    # Rules of mixes count matrices, so that all have to be known first.
    for _ in _tensors(s, layout, ask, seed):
        pass
    # As many heads of keys as of queries are what files say that have kv_b.
    layers = s.num_hidden_layers + s.num_nextn_predict_layers
    walk = Walk(types, Model.of(matrices, layers, queries_per_key=1, importance=True))
    chosen = {tensor.name: walk.choose(tensor).qtype for tensor in walk_order(matrices)}

    def type_of(name: str, shape: tuple[int, ...]) -> int:
        # Neither engine looks up rows that lie together with others.
        qtype = rows_apart(chosen[name]) if name == "token_embd.weight" else chosen[name]
        return fitting_type(qtype, shape)

    return _tensors(s, layout, type_of, seed)


def _tensors(s: Shape, layout: str, type_of: Callable[[str, tuple[int, ...]], int], seed: int) -> Iterator[NewTensor]:
    """Every tensor of the file. The type of most matrices is that of their name and shape."""

    def matrix(name, *shape, qtype=None, std=None):
        qtype = type_of(name, shape) if qtype is None else qtype
        std = shape[-1] ** -0.5 if std is None else std
        return NewTensor(name, shape, qtype, lambda: random_blocks(seed, name, shape, qtype, std))

    def norm(name, size):
        return NewTensor(name, (size,), ggml.F32, lambda: iter([normal(seed, name, size) * np.float32(0.1) + 1]))

    hidden = s.hidden_size
    yield matrix("token_embd.weight", s.vocab_size, hidden, std=1.0)
    yield norm("output_norm.weight", hidden)
    if not s.tie_word_embeddings:
        yield matrix("output.weight", s.vocab_size, hidden)
    for name, factors in zip(("long", "short"), s.rope_factors or (), strict=False):
        values = np.array(factors, np.float32)
        yield NewTensor(f"rope_factors_{name}.weight", values.shape, ggml.F32, lambda values=values: iter([values]))
    for i in range(s.num_hidden_layers + s.num_nextn_predict_layers):
        blk = f"blk.{i}."
        if i >= s.num_hidden_layers:
            yield matrix(blk + "nextn.eh_proj.weight", hidden, 2 * hidden)
            yield norm(blk + "nextn.enorm.weight", hidden)
            yield norm(blk + "nextn.hnorm.weight", hidden)
        yield from _attention(s, layout, matrix, norm, blk)
        if s.has_indexer(i):
            yield from _indexer(s, matrix, norm, blk, seed)
        yield norm(blk + "ffn_norm.weight", hidden)
        if i < s.dense_layers or not s.n_routed_experts:
            gated = s.architecture != "plm"
            yield from _ffn(matrix, blk, "", (), s.intermediate_size, hidden, gated=gated)
        else:
            yield from _experts(s, matrix, blk)


def _attention(s: Shape, layout: str, matrix: MakeMatrix, norm: MakeMatrix, blk: str) -> Iterator[NewTensor]:
    hidden, heads, rank = s.hidden_size, s.num_attention_heads, s.kv_lora_rank
    queries = heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
    yield norm(blk + "attn_norm.weight", hidden)
    if s.q_lora_rank:
        yield matrix(blk + "attn_q_a.weight", s.q_lora_rank, hidden)
        yield norm(blk + "attn_q_a_norm.weight", s.q_lora_rank)
        yield matrix(blk + "attn_q_b.weight", queries, s.q_lora_rank)
    else:
        yield matrix(blk + "attn_q.weight", queries, hidden)
    yield matrix(blk + "attn_kv_a_mqa.weight", rank + s.qk_rope_head_dim, hidden)
    yield norm(blk + "attn_kv_a_norm.weight", rank)
    if layout != "split":
        yield matrix(blk + "attn_kv_b.weight", heads * (s.qk_nope_head_dim + s.v_head_dim), rank)
    if layout != "kv_b":
        yield from _split_kv_b(s, matrix, blk, flat=layout == "all")
    yield matrix(blk + "attn_output.weight", hidden, heads * s.v_head_dim)


def _experts(s: Shape, matrix: MakeMatrix, blk: str) -> Iterator[NewTensor]:
    """The router, the routed experts and the shared ones."""
    experts, inner, hidden = s.n_routed_experts, s.moe_intermediate_size, s.hidden_size
    yield matrix(blk + "ffn_gate_inp.weight", experts, hidden, qtype=ggml.F32)
    if s.scoring_func == "sigmoid":
        yield matrix(blk + "exp_probs_b.bias", experts, qtype=ggml.F32, std=0.1)
    if s.fused_experts:
        yield matrix(blk + "ffn_gate_up_exps.weight", experts, 2 * inner, hidden)
        yield matrix(blk + "ffn_down_exps.weight", experts, hidden, inner)
    else:
        yield from _ffn(matrix, blk, "_exps", (experts,), inner, hidden)
    if s.n_shared_experts:
        yield from _ffn(matrix, blk, "_shexp", (), inner * s.n_shared_experts, hidden)


def _indexer(s: Shape, matrix: MakeMatrix, norm: MakeNorm, blk: str, seed: int) -> Iterator[NewTensor]:
    """The indexer of sparse attention. Its weights for heads are F32 in files of llama.cpp's converter."""
    size, bias = s.index_head_dim, blk + "indexer.k_norm.bias"
    yield matrix(blk + "indexer.attn_q_b.weight", s.index_n_heads * size, s.q_lora_rank)
    yield matrix(blk + "indexer.attn_k.weight", size, s.hidden_size)
    yield norm(blk + "indexer.k_norm.weight", size)
    yield NewTensor(bias, (size,), ggml.F32, lambda: iter([normal(seed, bias, size) * np.float32(0.1)]))
    yield matrix(blk + "indexer.proj.weight", s.index_n_heads, s.hidden_size, qtype=ggml.F32)


def _ffn(
    matrix: MakeMatrix,
    blk: str,
    suffix: str,
    experts: tuple[int, ...],
    inner: int,
    hidden: int,
    gated: bool = True,
) -> Iterator[NewTensor]:
    if gated:
        yield matrix(f"{blk}ffn_gate{suffix}.weight", *experts, inner, hidden)
    yield matrix(f"{blk}ffn_up{suffix}.weight", *experts, inner, hidden)
    yield matrix(f"{blk}ffn_down{suffix}.weight", *experts, hidden, inner)


def _split_kv_b(s: Shape, matrix: MakeMatrix, blk: str, flat: bool) -> Iterator[NewTensor]:
    """k_b [H, rank, nope] and v_b [H, v, rank]; two-dimensional if `flat`.

    They hold the weights of kv_b, unless k_b has a type that cannot be quantised here: then they are drawn apart.
    """
    heads, nope, rank = s.num_attention_heads, s.qk_nope_head_dim, s.kv_lora_rank
    k_shape, v_shape = (heads, rank, nope), (heads, s.v_head_dim, rank)
    if flat:
        k_shape, v_shape = (heads * rank, nope), (heads * s.v_head_dim, rank)
    # The weights of k_b are those of kv_b, transposed, and as large.
    k_b = matrix(blk + "attn_k_b.weight", *k_shape, std=rank**-0.5)
    v_b = matrix(blk + "attn_v_b.weight", *v_shape)
    if ggml.NAME[k_b.qtype] not in QUANTISERS:
        yield from (k_b, v_b)
        return
    # In the type of v_b, whose rows are copied.
    kv_b = matrix(blk + "attn_kv_b.weight", heads * (nope + s.v_head_dim), rank, qtype=v_b.qtype)

    def rows():
        data = np.concatenate([piece.view(np.uint8).reshape(-1) for piece in kv_b.pieces()])
        return data.reshape(heads, nope + s.v_head_dim, -1)

    def k_pieces():
        k = dequantise(rows()[:, :nope], kv_b.qtype)
        yield quantise(k.transpose(0, 2, 1), k_b.qtype)

    def v_pieces():
        yield np.ascontiguousarray(rows()[:, nope:])

    yield k_b._replace(pieces=k_pieces)
    yield v_b._replace(pieces=v_pieces)


EXAMPLES = """\b
Examples:
  python tools/make_model.py v2-lite v2-lite-q4_0.gguf
  python tools/make_model.py v2-lite lite.gguf --vocab ../shared/data/ggml-vocab-deepseek-llm.gguf
  python tools/make_model.py v2-lite v2-lite-q4_k_m.gguf --mix q4_k_m
  python tools/make_model.py v3 v3-4-layers.gguf --layers 4 --qtype q8_0 --layout split
  python tools/make_model.py tiny tiny.gguf --qtype f32 --seed 1
"""


@click.command(epilog=EXAMPLES)
@click.argument("preset", type=click.Choice(list(PRESETS)))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), help="Number of layers instead of the model's own.")
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="kv_b",
    show_default=True,
    help="kv_b; split: k_b and v_b, as llama.cpp writes now; all: the three, as ik_llama.cpp writes.",
)
@click.option(
    "--qtype",
    type=click.Choice(QTYPE_NAMES),
    default="q4_0",
    show_default=True,
    help="Type of the matrices. Norms and router are F32.",
)
@click.option(
    "--output-type",
    type=click.Choice(QTYPE_NAMES),
    help="Type of the output matrix. [default: q6_k with a quantised --qtype]",
)
@click.option(
    "--mix",
    type=click.Choice(list(MIXES)),
    help="Types by tensor and layer, as llama-quantize chooses them or public files have them, instead of one --qtype.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--vocab",
    type=click.Path(path_type=Path),
    help="GGUF file whose tokenizer is copied. [default: a synthetic byte-level BPE]",
)
def main(preset, out, layers, layout, qtype, output_type, mix, seed, vocab):
    """Write OUT, a GGUF file of random weights in the shape of PRESET."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    shape = PRESETS[preset]
    count = layers or shape.num_hidden_layers
    if shape.architecture == "deepseek2" and bool(shape.q_lora_rank) == (count in (26, 27)):
        click.echo(
            "note: llama.cpp and ik_llama.cpp want q-LoRA unless a model has 26 or 27 layers: they refuse this file",
            err=True,
        )
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", visible=False)
            make_model(
                out,
                shape,
                layers=layers,
                layout=layout,
                qtype=qtype,
                output_type=output_type,
                mix=mix,
                seed=seed,
                vocab=vocab,
                progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )
    except PymlaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
