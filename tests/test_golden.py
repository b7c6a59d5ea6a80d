"""Whole models against the logits that transformers gave for them (tools/make_golden.py)."""

import dataclasses
import functools
import json
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
from cases import TINY
from compare import assert_close, relative_error
from make_golden import SPARSE_SHAPES
from make_model import make_model

import pymla
from pymla import ggml
from pymla.engine.model import Model

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("v2-lite", "v2", "v3", "moonlight", "minicpm3", "mistral4")
PROMPTS = ("one", "short", "long")
BACKENDS = ("reference", "cpu")
MLA = ("auto", "0", "1", "2", "3")
EXACT = {"rtol_max": 1e-4, "reason": "float32 throughout: order of summation only"}


@functools.cache
def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded(name, device="cpu", mla="auto", cache_type="f32"):
    return pymla.load(GOLDEN / f"{name}.gguf", device=device, mla=mla, cache_type=cache_type)


def test_provenance_names_every_golden_file():
    models = json.loads((GOLDEN / "provenance.json").read_text())["models"]
    assert sorted(models) == sorted((*NAMES, *SPARSE_SHAPES)) == sorted(path.stem for path in GOLDEN.glob("*.gguf"))


@pytest.mark.parametrize("mla", MLA)
@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name, device, mla):
    model = loaded(name, device, mla)
    for prompt in PROMPTS:
        actual = model.logits(golden(name)[f"{prompt}_ids"])
        assert actual.dtype == np.float32
        assert_close(actual, golden(name)[f"{prompt}_logits"], **EXACT)


# Half of the tokens, because a rounding that changes which experts a token takes changes its logits entirely, and
# random models have no clear favourites. Attention over q8_0 is on integers.
@pytest.mark.parametrize(("cache_type", "allowed"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 6e-2)])
@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_smaller_caches_stay_close(name, device, cache_type, allowed):
    for mla in MLA:
        actual = loaded(name, device, mla, cache_type).logits(golden(name)["long_ids"])
        expected = golden(name)["long_logits"]
        errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
        print(f"{name} {device} mla {mla} {cache_type}: median error {np.median(errors):.1e}, worst {max(errors):.1e}")
        assert np.median(errors) < allowed


@pytest.mark.parametrize("mla", MLA)
@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_at_a_time_equals_the_prompt_at_once(name, device, mla):
    model = loaded(name, device, mla).model
    sequence = model.new_sequence()
    ids = golden(name)["long_ids"]
    actual = np.concatenate([model.forward([(sequence, ids[i : i + 1])]) for i in range(len(ids))])
    assert sequence.length == len(ids)
    model.free(sequence)
    assert_close(actual, golden(name)["long_logits"], **EXACT)


@pytest.mark.parametrize("mla", MLA)
@pytest.mark.parametrize("device", BACKENDS)
def test_a_prompt_in_pieces_equals_the_prompt_at_once(device, mla):
    model = loaded("v3", device, mla).model
    sequence = model.new_sequence()
    # Pieces that begin and end inside a page of 64 and at its border.
    pieces = np.split(golden("v3")["long_ids"], [5, 64, 65, 66, 80])
    actual = np.concatenate([model.forward([(sequence, piece)], logits="all") for piece in pieces])
    model.free(sequence)
    assert_close(actual, golden("v3")["long_logits"], **EXACT)


@pytest.mark.parametrize("mla", MLA)
@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_sequences_in_one_batch_do_not_touch_each_other(name, device, mla):
    one_sequence = loaded(name, device, mla).model
    model = Model(
        one_sequence.config,
        one_sequence.weights,
        one_sequence.backend,
        cache_type="f32",
        mla=mla,
        ctx=one_sequence.ctx,
        cache_tokens=3 * one_sequence.ctx,
    )
    prompts = [golden(name)[f"{prompt}_ids"] for prompt in PROMPTS]
    expected = [golden(name)[f"{prompt}_logits"] for prompt in PROMPTS]
    one, short, long = sequences = [model.new_sequence() for _ in PROMPTS]

    first = model.forward([(long, prompts[2][:70]), (short, prompts[1][:8])])
    assert_close(first, [expected[2][69], expected[1][7]], **EXACT)
    # Generation, a whole prompt of one token and a piece of a prompt in one step, in another order.
    second = model.forward([(short, prompts[1][8:]), (one, prompts[0]), (long, prompts[2][70:99])])
    assert_close(second, [expected[1][8], expected[0][0], expected[2][98]], **EXACT)
    third = model.forward([(long, prompts[2][99:])])
    assert_close(third, expected[2][99:], **EXACT)
    assert [s.length for s in sequences] == [1, 9, 100]
    for sequence in sequences:
        model.free(sequence)


@pytest.mark.parametrize("device", BACKENDS)
def test_pages_of_a_freed_sequence_serve_the_next(device):
    model = loaded("v3", device)
    for _ in range(3):
        assert_close(model.logits(golden("v3")["long_ids"]), golden("v3")["long_logits"], **EXACT)
        assert_close(model.logits(golden("v3")["short_ids"]), golden("v3")["short_logits"], **EXACT)


def with_layout(source, path, layout):
    """Write a copy of a F32 file with kv_b in another layout."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)

    def value(key):
        return reader.fields[f"{architecture}.{key}"].contents()

    heads, rank = value("attention.head_count"), value("attention.kv_lora_rank")
    head_dim = value("attention.key_length")
    v_dim = value("embedding_length") // heads if architecture == "minicpm3" else value("attention.value_length")
    nope = head_dim - value("rope.dimension_count")
    changed = {}
    if layout == "split":
        changed = {
            "head_count_kv": 1,
            "key_length": rank + head_dim - nope,
            "value_length": rank,
            "key_length_mla": head_dim,
            "value_length_mla": v_dim,
        }
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            short = key.removeprefix(f"{architecture}.attention.")
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, changed.pop(short, field.contents()), field.types[0], sub_type)
    for short, new in changed.items():
        writer.add_uint32(f"{architecture}.attention.{short}", new)
    for tensor in reader.tensors:
        if not tensor.name.endswith("attn_kv_b.weight") or layout == "all":
            writer.add_tensor(tensor.name, tensor.data)
        if tensor.name.endswith("attn_kv_b.weight") and layout != "kv_b":
            k, v = np.split(tensor.data.reshape(heads, nope + v_dim, rank), [nope], axis=1)
            k = k.transpose(0, 2, 1)
            if layout == "all":
                k, v = k.reshape(heads * rank, nope), v.reshape(heads * v_dim, rank)
            writer.add_tensor(tensor.name.replace("kv_b", "k_b"), np.ascontiguousarray(k))
            writer.add_tensor(tensor.name.replace("kv_b", "v_b"), np.ascontiguousarray(v))
    return gguf_files.finish(writer, path)


@pytest.mark.parametrize("layout", ["split", "all"])
@pytest.mark.parametrize("device", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_kv_b_give_the_same_logits(name, device, layout, tmp_path):
    path = with_layout(GOLDEN / f"{name}.gguf", tmp_path / f"{layout}.gguf", layout)
    for mla in MLA:
        model = pymla.load(path, device=device, mla=mla, cache_type="f32")
        assert_close(model.logits(golden(name)["long_ids"]), golden(name)["long_logits"], **EXACT)


@pytest.mark.parametrize("layout", ["kv_b", "split", "all"])
@pytest.mark.parametrize("cache_type", ["f32", "q8_0"])
def test_quantised_files_in_every_layout(cache_type, layout, tmp_path):
    """Q4_0 as llama.cpp writes it now and before: k_b may be derived, and is then of another type than v_b."""
    shape = TINY["moonlight"]
    shape = dataclasses.replace(shape, num_experts_per_tok=shape.n_routed_experts)  # none to choose differently
    path = make_model(tmp_path / "model.gguf", shape, layout=layout, qtype=ggml.Q4_0)
    ids = np.arange(1, 90, dtype=np.int32)
    logits = []
    for device in BACKENDS:
        with pymla.load(path, device=device, cache_type=cache_type, ctx=128) as model:
            logits.append(model.logits(ids))
    assert_close(logits[1], logits[0], rtol_max=0.1, reason="int8 activations, keys and values")
