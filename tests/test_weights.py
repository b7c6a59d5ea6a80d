"""The tensors of a file where the model looks for them."""

import dataclasses

import gguf
import numpy as np
import pytest
from cases import TINY
from make_model import make_model

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.placement import Placement
from pymla.models.weights import Weights
from pymla.reference.formats import plain_rows
from pymla.reference.quant import dequantise, quantise
from pymla.tensor import QTensor

#: Of `make_model`, and "flat": two-dimensional ``attn_k_b`` and ``attn_v_b`` without ``attn_kv_b``.
LAYOUTS = ("kv_b", "split", "all", "flat")


@pytest.fixture
def written(tmp_path):
    """Write a tiny model; the opened file, and its configuration."""

    def write(name="v3", qtype=ggml.F32, layout="kv_b", **changes):
        path = make_model(tmp_path / "m.gguf", dataclasses.replace(TINY[name], **changes), qtype=qtype, layout=layout)
        file = ModelFile.open(path)
        return file, ModelConfig.from_gguf(file)

    return write


def raw(file):
    """Every tensor's bytes by name, as gguf-py finds them: rows of bytes, or of numbers for float32."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file.path).tensors}


def same(found, expected):
    """Whether a vector or a QTensor holds the bytes of a tensor."""
    found = found.data if isinstance(found, QTensor) else found
    return np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


VECTORS = {"attn_norm", "attn_q_a_norm", "attn_kv_a_norm", "ffn_norm", "exp_probs_b"}
DENSE = {"ffn_gate", "ffn_up", "ffn_down"}
EXPERTS = {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
ATTENTION = {"attn_norm", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b", "attn_v_b", "attn_output", "ffn_norm"}
Q_LORA = {"attn_q_a", "attn_q_a_norm", "attn_q_b"}


@pytest.mark.parametrize("qtype", [ggml.F32, ggml.Q8_0], ids=ggml.NAME.get)
@pytest.mark.parametrize(
    ("name", "changes", "dense", "sparse"),
    [
        ("v3", {}, Q_LORA | DENSE, Q_LORA | DENSE | EXPERTS | {"exp_probs_b"}),
        ("v2-lite", {}, {"attn_q"} | DENSE, {"attn_q"} | DENSE | EXPERTS),
        ("v2-lite", {"n_shared_experts": 0}, {"attn_q"} | DENSE, {"attn_q"} | EXPERTS),
    ],
    ids=["q-LoRA and bias", "plain", "no shared experts"],
)
def test_each_tensor_has_its_place(written, name, changes, dense, sparse, qtype):
    file, config = written(name, qtype, **changes)
    weights, there = Weights.from_gguf(file, config), raw(file)
    assert weights.token_embd.qtype == weights.output.qtype == qtype
    assert same(weights.token_embd, there["token_embd.weight"])
    assert same(weights.output, there["output.weight"])
    assert same(weights.output_norm, there["output_norm.weight"])
    assert len(weights.layers) == config.num_hidden_layers
    for i, layer in enumerate(weights.layers):
        shared = "" if i < config.first_k_dense_replace else "_shexp"
        tensors = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
        tensors = {field: tensor for field, tensor in tensors.items() if tensor is not None}
        assert set(tensors) == ATTENTION | (sparse if shared else dense)
        for field, tensor in tensors.items():
            if field in ("attn_k_b", "attn_v_b"):
                continue
            kind = "bias" if field == "exp_probs_b" else "weight"
            expected = there[f"blk.{i}.{field}{shared if field in DENSE else ''}.{kind}"]
            assert same(tensor, expected), field
            if field in VECTORS:
                assert (tensor.dtype, tensor.shape) == (np.float32, expected.shape)
            else:
                assert tensor.qtype == (ggml.F32 if field == "ffn_gate_inp" else qtype)
                assert tensor.data.shape[:-1] == expected.shape[:-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("qtype", [ggml.F32, ggml.F16, ggml.Q8_0], ids=ggml.NAME.get)
def test_keys_and_values_of_all_layouts(written, layout, qtype):
    """`W_k_b` and `W_v_b` head by head, with the rows of ``attn_kv_b`` whatever the file has."""
    file, config = written("v3", qtype)
    heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    there = raw(file)
    file, config = written("v3", qtype, "all" if layout == "flat" else layout)  # the same weights
    if layout == "flat":
        for i in range(config.num_hidden_layers):
            del file.tensors[f"blk.{i}.attn_kv_b.weight"]
    for i, layer in enumerate(Weights.from_gguf(file, config).layers):
        by_head = there[f"blk.{i}.attn_kv_b.weight"]
        by_head = np.ascontiguousarray(by_head).view(np.uint8).reshape(heads, nope + v, -1)
        assert layer.attn_v_b.qtype == qtype
        assert same(layer.attn_v_b, by_head[:, nope:])
        if layout in ("split", "flat") and qtype == ggml.Q8_0:
            # The transpose has other blocks: its values are quantised anew, once by the file and once at load.
            stored = raw(file)[f"blk.{i}.attn_k_b.weight"].reshape(heads, config.kv_lora_rank, -1)
            expected = quantise(dequantise(stored, qtype).swapaxes(1, 2), ggml.Q8_0)
            assert layer.attn_k_b.qtype == ggml.Q8_0
            assert not layer.attn_k_b.data.flags.writeable
        else:
            expected = by_head[:, :nope]
            assert layer.attn_k_b.qtype == qtype
        assert same(layer.attn_k_b, expected)
        assert layer.attn_k_b.data.shape[:2] == (heads, nope)
        assert layer.attn_v_b.data.shape[:2] == (heads, v)


@pytest.mark.parametrize("qtype", [ggml.F32, ggml.Q8_0], ids=ggml.NAME.get)
def test_gate_comes_before_up_where_one_tensor_holds_both(written, qtype):
    """As llama.cpp's ``ffn_gate_up_exps``: of each expert first the rows of gate, then those of up."""
    file, config = written("v3", qtype)
    apart = Weights.from_gguf(file, config).layers
    for i in range(config.first_k_dense_replace, config.num_hidden_layers):
        gate, up = (file.tensors.pop(f"blk.{i}.ffn_{half}_exps.weight") for half in ("gate", "up"))
        experts, inner, columns = gate.shape
        data = np.concatenate([each.data.reshape(experts, inner, -1) for each in (gate, up)], axis=1).reshape(-1)
        name = f"blk.{i}.ffn_gate_up_exps.weight"
        file.tensors[name] = gate._replace(name=name, shape=(experts, 2 * inner, columns), data=data)
    for mine, other in zip(Weights.from_gguf(file, config).layers, apart, strict=True):
        if other.ffn_gate_exps is None:
            assert mine.ffn_gate_exps is None
            continue
        for half in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            assert getattr(mine, half).qtype == qtype
            assert getattr(mine, half).data.shape == getattr(other, half).data.shape
            assert same(getattr(mine, half), getattr(other, half).data), half
        assert not same(mine.ffn_gate_exps, other.ffn_up_exps.data)


def test_embeddings_serve_as_output_where_there_is_none(written):
    file, config = written(tie_word_embeddings=True)
    weights = Weights.from_gguf(file, config)
    assert weights.output is weights.token_embd


def test_progress(written):
    file, config = written()
    layers, sent = [], []
    weights = Weights.from_gguf(file, config, lambda *each: layers.append(each))
    assert layers == [(1, 3), (2, 3), (3, 3)]

    class Copied:
        """A memory to which arrays are copied in two parts."""

        @staticmethod
        def to_device(array, progress):
            for done in (array.nbytes // 2, array.nbytes):
                progress(done, array.nbytes)
            return array

    other = type("Other", (), {"memory": Copied})
    Weights.from_gguf(file, config, placement=Placement.on(other, 3), uploading=sent.append)
    arrays = [weights.token_embd, weights.output, weights.output_norm]
    arrays += [getattr(layer, each.name) for layer in weights.layers for each in dataclasses.fields(layer)]
    sizes = [each.data.nbytes if isinstance(each, QTensor) else each.nbytes for each in arrays if each is not None]
    assert sent == sorted(sent)
    assert len(sent) == 2 * len(sizes)
    assert sent[-1] == sum(sizes)
    Weights.from_gguf(file, config, placement=Placement.on(other, 3))  # nobody is told


def test_tensors_lie_in_the_memory_of_their_part(written):
    """Embedding, layers, routed experts and output, each on a backend of its own."""

    def backend(mark):
        memory = type("Memory", (), {"to_device": staticmethod(lambda array, progress: (mark, array))})
        return type(mark, (), {"memory": memory})

    def mark(tensor):
        return (tensor.data if isinstance(tensor, QTensor) else tensor)[0]

    file, config = written(tie_word_embeddings=True)
    embedding, first, second, third, output, e1, e2 = map(backend, ("emb", "l0", "l1", "l2", "out", "e1", "e2"))
    placement = Placement(embedding, (first, second, third), (first, e1, e2), output)
    weights = Weights.from_gguf(file, config, placement=placement)
    # The output is a second copy of the embeddings where it lies elsewhere.
    assert [mark(each) for each in (weights.token_embd, weights.output, weights.output_norm)] == ["emb", "out", "out"]
    for layer, own, experts in zip(weights.layers, ("l0", "l1", "l2"), ("l0", "e1", "e2"), strict=True):
        for field in dataclasses.fields(layer):
            tensor = getattr(layer, field.name)
            if tensor is not None:
                assert mark(tensor) == (experts if field.name.endswith("_exps") else own), field.name


@pytest.mark.parametrize("layout", ["kv_b", "split"])
@pytest.mark.parametrize("qtype", [ggml.Q8_0_R8, ggml.BF16_R16, ggml.Q8_K_R8], ids=ggml.NAME.get)
def test_interleaved_rows_become_plain(written, qtype, layout):
    """Copies, wherever a matrix belongs, of experts and of heads as well."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "kv_lora_rank": 256}
    file, config = written("v3", qtype, layout, q_lora_rank=256, vocab_size=320, **sizes)
    weights, plain = Weights.from_gguf(file, config), ggml.PLAIN[qtype]
    layer, prefix = weights.layers[1], "blk.1."
    for field, name in (("attn_q_b", "attn_q_b"), ("ffn_up_exps", "ffn_up_exps"), ("ffn_down", "ffn_down_shexp")):
        info, found = file.tensors[f"{prefix}{name}.weight"], getattr(layer, field)
        assert (info.qtype, found.qtype) == (qtype, plain)
        rows = info.data.reshape(-1, ggml.row_bytes(qtype, info.shape[-1]))
        assert same(found, plain_rows(rows, qtype))
        assert found.data.shape == (*info.shape[:-1], ggml.row_bytes(plain, info.shape[-1]))
        assert not found.data.flags.writeable
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
    info = file.tensors[prefix + ("attn_kv_b.weight" if layout == "kv_b" else "attn_v_b.weight")]
    rows = plain_rows(info.data.reshape(-1, ggml.row_bytes(qtype, 256)), qtype).reshape(
        heads, -1, layer.attn_v_b.data.shape[-1]
    )
    assert same(layer.attn_v_b, rows[:, nope:] if layout == "kv_b" else rows)
    assert layer.attn_v_b.qtype == plain


# What is refused ------------------------------------------------------------------------------------------------------


def test_tensors_that_are_missing(written):
    file, config = written()
    optional = {"blk.1.exp_probs_b.bias", "blk.2.exp_probs_b.bias", "output.weight"}
    for name in list(file.tensors):
        info = file.tensors.pop(name)
        if name in optional:
            Weights.from_gguf(file, config)
        else:
            with pytest.raises(PymlaError, match=r"m\.gguf: tensor .* is missing") as caught:
                Weights.from_gguf(file, config)
            if "_exps" not in name and "attn_kv_b" not in name:  # of which there are several forms
                assert name in str(caught.value)
        file.tensors[name] = info


def test_tensors_of_another_shape(written):
    file, config = written("v3", ggml.F32, "split")
    for name, info in list(file.tensors.items()):
        file.tensors[name] = info._replace(shape=(*info.shape[:-1], info.shape[-1] + 1))
        with pytest.raises(PymlaError, match=r"m\.gguf: tensor .* has shape \[.*\], expected \[") as caught:
            Weights.from_gguf(file, config)
        assert name in str(caught.value)
        expected = str(list(info.shape))
        if "attn_k_b" in name:  # which may also be flat
            heads, rank, nope = info.shape
            expected += f" or [{heads * rank}, {nope}]"
        assert str(caught.value).partition("expected ")[2].startswith(expected)
        file.tensors[name] = info


def test_tensors_of_another_type(written):
    file, config = written()
    for name, qtype, words in (
        (
            "blk.1.attn_output.weight",
            ggml.ID["I32"],
            r"has type I32, which pymla does not run; take another .* runs F32, .*Q6_K",
        ),
        ("blk.1.ffn_norm.weight", ggml.F16, "has type F16, expected F32"),
    ):
        info = file.tensors[name]
        file.tensors[name] = info._replace(qtype=qtype)
        with pytest.raises(PymlaError, match=rf"m\.gguf: tensor {name} {words}"):
            Weights.from_gguf(file, config)
        file.tensors[name] = info


def test_rows_that_their_plain_type_does_not_hold(written):
    file, config = written()
    name = "blk.1.attn_output.weight"
    info = file.tensors[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml, "SUPPORTED", (*ggml.SUPPORTED, ggml.IQ1_S))
        file.tensors[name] = info._replace(qtype=ggml.IQ1_S_R4)
        with pytest.raises(
            PymlaError, match=rf"{name} has type IQ1_S_R4 and rows of 128 weights; .* multiples of 256; take"
        ):
            Weights.from_gguf(file, config)


# Views ----------------------------------------------------------------------------------------------------------------


def test_parts_of_a_matrix_are_views():
    data = np.arange(6 * 68, dtype=np.uint8).reshape(6, 68)  # 6 rows of two blocks of 32
    w = QTensor(ggml.Q8_0, data)
    for part, expected in (
        (w.rows(1, 4), data[1:4]),
        (w.by_rows(2), np.stack([data[0:2], data[2:4], data[4:6]])),
        (w.by_columns(32), np.stack([data[:, :34], data[:, 34:]])),
    ):
        assert part.qtype == ggml.Q8_0
        np.testing.assert_array_equal(part.data, expected)
        assert np.shares_memory(part.data, data)


def test_by_default_weights_are_views_of_the_file(written):
    file, config = written()
    weights = Weights.from_gguf(file, config)
    for i, layer in enumerate(weights.layers):
        assert np.shares_memory(layer.attn_output.data, file.tensors[f"blk.{i}.attn_output.weight"].data)
        assert np.shares_memory(layer.attn_norm, file.tensors[f"blk.{i}.attn_norm.weight"].data)
