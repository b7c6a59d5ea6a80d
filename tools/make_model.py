"""A GGUF file of random weights in a real model's shape, to measure and test engines without the trained model.

Metadata and tensor names are those that llama.cpp's convert_hf_to_gguf.py writes, so that llama.cpp and ik_llama.cpp
load the file too. A seed gives the same model in all three kv_b layouts.
"""

import functools
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import gguf
import numpy as np
from gguf import GGUFValueType, LlamaFileType

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import outputs
from pymla.files.gguf_reader import ModelFile
from pymla.reference.quant import dequantise, quantise

LAYOUTS = ("kv_b", "split", "all")
QTYPES = ggml.SUPPORTED
QTYPE_NAMES = tuple(ggml.NAME[t].lower() for t in QTYPES)
FILE_TYPES = {t: LlamaFileType["ALL_F32" if t == ggml.F32 else f"MOSTLY_{ggml.NAME[t]}"] for t in QTYPES}
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes and switches of a model, named as in DeepSeek's config.json.

    ``q_lora_rank=0`` means none, ``n_group=1`` no groups, ``yarn_factor=1`` no YaRN. ``scoring_func="sigmoid"`` brings
    the expert bias ``exp_probs_b``. ``tie_word_embeddings`` leaves the output matrix out.
    """

    name: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    num_attention_heads: int
    vocab_size: int
    first_k_dense_replace: int = 1
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    context_length: int = 163840
    yarn_factor: float = 1.0
    yarn_original: int = 4096
    mscale_all_dim: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    tie_word_embeddings: bool = False


PRESETS = {
    "v2-lite": Shape(
        name="DeepSeek-V2-Lite",
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        num_attention_heads=16,
        vocab_size=102400,
        yarn_factor=40.0,
        mscale_all_dim=0.707,
    ),
    "v2": Shape(
        name="DeepSeek-V2",
        hidden_size=5120,
        num_hidden_layers=60,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_shared_experts=2,
        num_attention_heads=128,
        vocab_size=102400,
        q_lora_rank=1536,
        routed_scaling_factor=16.0,
        n_group=8,
        topk_group=3,
        yarn_factor=40.0,
        mscale_all_dim=0.707,
    ),
    "v3": Shape(
        name="DeepSeek-V3",
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        num_attention_heads=128,
        vocab_size=129280,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        n_group=8,
        topk_group=4,
        yarn_factor=40.0,
    ),
    "kimi-k2": Shape(
        name="Kimi-K2",
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=384,
        num_experts_per_tok=8,
        n_shared_experts=1,
        num_attention_heads=64,
        vocab_size=163840,
        q_lora_rank=1536,
        routed_scaling_factor=2.827,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        rope_theta=50000.0,
        context_length=131072,
        yarn_factor=32.0,
        beta_fast=1.0,
    ),
    "glm-4.7-flash": Shape(
        name="GLM-4.7-Flash",
        hidden_size=2048,
        num_hidden_layers=47,
        intermediate_size=10240,
        moe_intermediate_size=1536,
        n_routed_experts=64,
        num_experts_per_tok=4,
        n_shared_experts=1,
        num_attention_heads=20,
        vocab_size=154880,
        q_lora_rank=768,
        qk_nope_head_dim=192,
        v_head_dim=256,
        routed_scaling_factor=1.8,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        context_length=202752,
    ),
    "moonlight": Shape(
        name="Moonlight-16B-A3B",
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        num_attention_heads=16,
        vocab_size=163840,
        routed_scaling_factor=2.446,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        context_length=8192,
    ),
    "tiny": Shape(
        name="tiny",
        hidden_size=256,
        num_hidden_layers=4,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        num_attention_heads=4,
        vocab_size=512,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        n_group=4,
        topk_group=2,
        context_length=1024,
        yarn_factor=4.0,
        yarn_original=256,
    ),
}


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # NumPy order, columns last
    qtype: int
    pieces: Callable[[], Iterator[np.ndarray]]  # the tensor's bytes, in order

    @property
    def nbytes(self) -> int:
        return ggml.row_bytes(self.qtype, self.shape[-1]) * int(np.prod(self.shape[:-1]))


def make_model(
    path: str | Path,
    shape: str | Shape,
    *,
    layers: int | None = None,
    layout: str = "kv_b",
    qtype: int | str = ggml.Q4_0,
    output_type: int | str | None = None,
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
    qtype : type of the matrices; one whose block does not fit a row falls back to Q8_0, then F16, as llama.cpp does
    output_type : type of the output matrix; by default Q6_K where `qtype` is quantised, as real files have it
    seed : any non-negative integer
    vocab : a GGUF file whose tokenizer is copied; by default a synthetic byte-level BPE
    progress : called with (bytes written, bytes in all)

    Returns
    -------
    Path

    Raises
    ------
    PymlaError
        An unknown preset, layout or type; a vocabulary larger than the shape's; not enough free disk.
    """
    shape = _resolve(shape, layers)
    if layout not in LAYOUTS:
        raise PymlaError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    qtype = _type_id(qtype)
    if output_type is None:
        output_type = ggml.Q6_K if qtype in ggml.QUANTISED else qtype
    tensors = list(model_tensors(shape, layout, qtype, _type_id(output_type), seed))
    tokenizer = _copied_tokenizer(vocab, shape.vocab_size) if vocab else synthetic_tokenizer(shape.vocab_size)

    path = Path(path)
    total = sum(t.nbytes for t in tensors)
    _check_space(path, total)
    with outputs.replacing(path) as part:
        _write(part, shape, layout, qtype, tokenizer, tensors, total, progress)
    return path


def _resolve(shape, layers):
    if isinstance(shape, str):
        if shape not in PRESETS:
            raise PymlaError(f"unknown preset {shape!r}; choose {', '.join(PRESETS)}")
        shape = PRESETS[shape]
    if layers is not None:
        if layers < 1:
            raise PymlaError(f"a model needs at least one layer, not {layers}")
        shape = replace(shape, num_hidden_layers=layers)
    return shape


def _type_id(qtype):
    if isinstance(qtype, str):
        qtype = ggml.ID.get(qtype.upper(), qtype)
    if qtype not in QTYPES:
        raise PymlaError(
            f"no random weights of type {qtype!r}; choose {', '.join(ggml.NAME[t].lower() for t in QTYPES)}"
        )
    return qtype


def _check_space(path, needed):
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise PymlaError(f"{path}: cannot write there ({error.strerror})") from error
    if needed > free:
        raise PymlaError(
            f"{path}: needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free; take fewer --layers"
        )


def _write(path, shape, layout, qtype, tokenizer, tensors, total, progress):
    writer = gguf.GGUFWriter(path, "deepseek2")
    try:
        _add_metadata(writer, shape, layout, qtype)
        for key, value in tokenizer.items():
            _add_value(writer, key, value)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        done = 0
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece.data)
                done += piece.nbytes
                if progress:
                    progress(done, total)
            writer.write_padding(file, tensor.nbytes)
    finally:
        writer.close()


def _add_metadata(w, shape, layout, qtype):
    head_dim = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    w.add_type("model")
    w.add_name(shape.name)
    w.add_block_count(shape.num_hidden_layers)
    w.add_context_length(shape.context_length)
    w.add_embedding_length(shape.hidden_size)
    w.add_feed_forward_length(shape.intermediate_size)
    w.add_head_count(shape.num_attention_heads)
    w.add_rope_freq_base(shape.rope_theta)
    w.add_layer_norm_rms_eps(shape.rms_norm_eps)
    w.add_expert_used_count(shape.num_experts_per_tok)
    if shape.n_group > 1:
        w.add_expert_group_count(shape.n_group)
        w.add_expert_group_used_count(shape.topk_group)
    w.add_file_type(FILE_TYPES[qtype])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_leading_dense_block_count(min(shape.first_k_dense_replace, shape.num_hidden_layers))
    w.add_vocab_size(shape.vocab_size)
    if shape.q_lora_rank:
        w.add_q_lora_rank(shape.q_lora_rank)
    w.add_kv_lora_rank(shape.kv_lora_rank)
    if layout == "split":
        w.add_head_count_kv(1)
        w.add_key_length(shape.kv_lora_rank + shape.qk_rope_head_dim)
        w.add_value_length(shape.kv_lora_rank)
        w.add_key_length_mla(head_dim)
        w.add_value_length_mla(shape.v_head_dim)
    else:
        w.add_head_count_kv(shape.num_attention_heads)
        w.add_key_length(head_dim)
        w.add_value_length(shape.v_head_dim)
    w.add_expert_feed_forward_length(shape.moe_intermediate_size)
    w.add_expert_count(shape.n_routed_experts)
    w.add_expert_shared_count(shape.n_shared_experts)
    w.add_expert_weights_scale(shape.routed_scaling_factor)
    w.add_expert_weights_norm(shape.norm_topk_prob)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType[shape.scoring_func.upper()])
    w.add_rope_dimension_count(shape.qk_rope_head_dim)
    if shape.yarn_factor > 1:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(shape.yarn_factor)
        w.add_rope_scaling_orig_ctx_len(shape.yarn_original)
        w.add_rope_scaling_yarn_log_mul(0.1 * shape.mscale_all_dim)
        w.add_rope_scaling_yarn_beta_fast(shape.beta_fast)
        w.add_rope_scaling_yarn_beta_slow(shape.beta_slow)


def _add_value(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, np.ndarray):
        kind = GGUFValueType.FLOAT32 if value.dtype.kind == "f" else GGUFValueType.INT32
        writer.add_key_value(key, value.tolist(), GGUFValueType.ARRAY, kind)
    else:
        writer.add_array(key, value)


def _copied_tokenizer(path, vocab_size):
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


def _padding(start, stop):
    return [f"[PAD{i}]" for i in range(start, stop)]


def synthetic_tokenizer(vocab_size: int) -> dict[str, Any]:
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
    tokens = [*_byte_alphabet(), *(left + right for left, right in pairs)]
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


def _byte_alphabet():
    """GPT-2's printable character for every byte, in order of the byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def model_tensors(s: Shape, layout, qtype, output_type, seed) -> Iterator[Tensor]:
    """Every tensor of the file, in llama.cpp's order; weights are drawn when `Tensor.pieces` is called."""

    def matrix(name, *shape, qtype=qtype, std=None):
        qtype = fitting_type(qtype, shape[-1])
        std = shape[-1] ** -0.5 if std is None else std
        return Tensor(name, shape, qtype, lambda: random_blocks(seed, name, int(np.prod(shape)), qtype, std))

    def norm(name, size):
        return Tensor(name, (size,), ggml.F32, lambda: iter([_normal(seed, name, size) * np.float32(0.1) + 1]))

    hidden, heads, rank = s.hidden_size, s.num_attention_heads, s.kv_lora_rank
    head_dim = s.qk_nope_head_dim + s.qk_rope_head_dim
    yield matrix("token_embd.weight", s.vocab_size, hidden, std=1.0)
    yield norm("output_norm.weight", hidden)
    if not s.tie_word_embeddings:
        yield matrix("output.weight", s.vocab_size, hidden, qtype=output_type)
    for i in range(s.num_hidden_layers):
        blk = f"blk.{i}."
        yield norm(blk + "attn_norm.weight", hidden)
        if s.q_lora_rank:
            yield matrix(blk + "attn_q_a.weight", s.q_lora_rank, hidden)
            yield norm(blk + "attn_q_a_norm.weight", s.q_lora_rank)
            yield matrix(blk + "attn_q_b.weight", heads * head_dim, s.q_lora_rank)
        else:
            yield matrix(blk + "attn_q.weight", heads * head_dim, hidden)
        yield matrix(blk + "attn_kv_a_mqa.weight", rank + s.qk_rope_head_dim, hidden)
        yield norm(blk + "attn_kv_a_norm.weight", rank)
        kv_b = matrix(blk + "attn_kv_b.weight", heads * (s.qk_nope_head_dim + s.v_head_dim), rank)
        if layout != "split":
            yield kv_b
        if layout != "kv_b":
            yield from _split_kv_b(s, kv_b, blk, flat=layout == "all")
        yield matrix(blk + "attn_output.weight", hidden, heads * s.v_head_dim)
        yield norm(blk + "ffn_norm.weight", hidden)
        if i < s.first_k_dense_replace:
            yield from _ffn(matrix, blk, "", (), s.intermediate_size, hidden)
            continue
        yield matrix(blk + "ffn_gate_inp.weight", s.n_routed_experts, hidden, qtype=ggml.F32)
        if s.scoring_func == "sigmoid":
            yield matrix(blk + "exp_probs_b.bias", s.n_routed_experts, qtype=ggml.F32, std=0.1)
        yield from _ffn(matrix, blk, "_exps", (s.n_routed_experts,), s.moe_intermediate_size, hidden)
        if s.n_shared_experts:
            yield from _ffn(matrix, blk, "_shexp", (), s.moe_intermediate_size * s.n_shared_experts, hidden)


def _ffn(matrix, blk, suffix, experts, inner, hidden):
    yield matrix(f"{blk}ffn_gate{suffix}.weight", *experts, inner, hidden)
    yield matrix(f"{blk}ffn_up{suffix}.weight", *experts, inner, hidden)
    yield matrix(f"{blk}ffn_down{suffix}.weight", *experts, hidden, inner)


def fitting_type(qtype: int, columns: int) -> int:
    """`qtype`, or the type that llama.cpp falls back to where the block does not divide the row."""
    for candidate in (qtype, ggml.Q8_0):
        if columns % ggml.BLOCK_SIZE[candidate] == 0:
            return candidate
    return ggml.F16


def _split_kv_b(s, kv_b, blk, flat):
    """k_b [H, rank, nope] and v_b [H, v, rank], the same weights as `kv_b`; two-dimensional if `flat`."""
    heads, nope, rank = s.num_attention_heads, s.qk_nope_head_dim, s.kv_lora_rank
    k_type = fitting_type(kv_b.qtype, nope)

    def rows():
        data = np.concatenate([piece.view(np.uint8).reshape(-1) for piece in kv_b.pieces()])
        return data.reshape(heads, nope + s.v_head_dim, -1)

    def k_b():
        k = dequantise(rows()[:, :nope], kv_b.qtype)
        yield quantise(k.transpose(0, 2, 1), k_type)

    def v_b():
        yield np.ascontiguousarray(rows()[:, nope:])

    k_shape, v_shape = (heads, rank, nope), (heads, s.v_head_dim, rank)
    if flat:
        k_shape, v_shape = (heads * rank, nope), (heads * s.v_head_dim, rank)
    yield Tensor(blk + "attn_k_b.weight", k_shape, k_type, k_b)
    yield Tensor(blk + "attn_v_b.weight", v_shape, kv_b.qtype, v_b)


def _bits(seed, name):
    """Random bits of a tensor. SFC64 gives 2.7 GB/s, more than a disk takes."""
    return np.random.SFC64(np.random.SeedSequence([seed, *name.encode()]))


def _normal(seed, name, size):
    return np.random.Generator(_bits(seed, name)).standard_normal(size, np.float32)


def random_blocks(seed, name, count, qtype, std) -> Iterator[np.ndarray]:
    """Bytes of `count` weights of mean 0 and standard deviation `std`, in pieces."""
    bits = _bits(seed, name)
    fill = _FILL[qtype]
    blocks = count // ggml.BLOCK_SIZE[qtype]
    step = CHUNK_BYTES // ggml.BLOCK_BYTES[qtype]
    for start in range(0, blocks, step):
        yield fill(bits, min(step, blocks - start), qtype, std)


def _raw(bits, count, width):
    """`count` rows of `width` random bytes."""
    nbytes = count * width
    return bits.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes].reshape(count, width)


@functools.cache
def _quantiles():
    """65,536 equally probable values of the normal distribution: random 16-bit integers pick from them."""
    normal = statistics.NormalDist()
    values = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    return (values / values.std()).astype(np.float32)


def _floats(bits, count, qtype, std):
    width = ggml.BLOCK_BYTES[qtype]
    table = quantise(_quantiles() * np.float32(std), qtype).view(np.dtype(f"u{width}"))
    return table[_raw(bits, count, 2).view(np.uint16)[:, 0]]


def _scales(size, signed):
    """256 block scales of root mean square `size`, from half to three halves of it."""
    scales = np.linspace(0.5, 1.5, 256)
    if signed:
        scales[1::2] *= -1
    return (scales * size / np.sqrt(np.mean(scales**2))).astype(np.float16)


# The codes are uniform. Their mean is half a step below zero, which would give every matrix one direction that it
# amplifies far above the others; scales of random sign cancel it, and real files have scales of both signs too.


def _blocks(bits, count, qtype, std, mean_square, minimum=None):
    """Blocks of uniform codes of a mean square, or of a variance where each block has a minimum in units of its
    scale."""
    blocks = _raw(bits, count, ggml.BLOCK_BYTES[qtype])
    d = _scales(std / np.sqrt(mean_square), signed=minimum is None)[blocks[:, 0]]
    halves = [d]
    if minimum is not None:
        halves.append((d.astype(np.float32) * np.float32(minimum)).astype(np.float16))
    blocks[:, : 2 * len(halves)] = np.stack(halves, axis=1).view(np.uint8)
    return blocks


def _blocks_q8_0(bits, count, qtype, std):
    blocks = _raw(bits, count, 34)
    d = _scales(std / np.sqrt(127 * 128 / 3), signed=True)[blocks[:, 0]]
    codes = blocks[:, 2:].view(np.int8)
    np.maximum(codes, -127, out=codes)  # no quantiser writes -128
    blocks[:, :2] = d[:, None].view(np.uint8)
    return blocks


def _blocks_q6_k(bits, count, qtype, std):
    blocks = _raw(bits, count, 210)
    scales = blocks[:, 192:208]
    # From ±64 to ±127; 341.5 is the mean square of the codes -32..31.
    scales[...] = np.where(scales & 1, 64 + (scales >> 2), 192 - (scales >> 2))
    mean_square = np.mean(np.arange(64, 128) ** 2)
    d = _scales(std / np.sqrt(341.5 * mean_square), signed=True)[blocks[:, 208]]
    blocks[:, 208:] = d[:, None].view(np.uint8)
    return blocks


_FILL = {
    ggml.F32: _floats,
    ggml.F16: _floats,
    ggml.BF16: _floats,
    ggml.Q4_0: functools.partial(_blocks, mean_square=21.5),  # of -8..7
    ggml.Q4_1: functools.partial(_blocks, mean_square=21.25, minimum=-7.5),  # the variance of 0..15
    ggml.Q5_0: functools.partial(_blocks, mean_square=85.5),  # of -16..15
    ggml.Q5_1: functools.partial(_blocks, mean_square=85.25, minimum=-15.5),  # the variance of 0..31
    ggml.Q8_0: _blocks_q8_0,
    ggml.Q6_K: _blocks_q6_k,
}

EXAMPLES = """\b
Examples:
  python tools/make_model.py v2-lite v2-lite-q4_0.gguf
  python tools/make_model.py v2-lite lite.gguf --vocab ../shared/data/ggml-vocab-deepseek-llm.gguf
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
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--vocab",
    type=click.Path(path_type=Path),
    help="GGUF file whose tokenizer is copied. [default: a synthetic byte-level BPE]",
)
def main(preset, out, layers, layout, qtype, output_type, seed, vocab):
    """Write OUT, a GGUF file of random weights in the shape of PRESET."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    shape = PRESETS[preset]
    count = layers or shape.num_hidden_layers
    if bool(shape.q_lora_rank) == (count in (26, 27)):
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
                seed=seed,
                vocab=vocab,
                progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            )
    except PymlaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
