"""Quantising files: plans, what is written, and what is refused."""

# Fixtures of another module are arguments here.
# ruff: noqa: F811

import dataclasses
import json
import math
import re

import gguf
import numpy as np
import pytest
from make_model import make_model
from test_cli import refused, run  # noqa: F401 - fixtures
from test_make_model import TINY

import pymla
from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_output import write_files
from pymla.files.gguf_parts import in_parts
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.files.imatrix_entries import Entry
from pymla.make import quantize, target_size
from pymla.make.importance import Importance
from pymla.make.knapsack import Option
from pymla.make.mixes import ALIASES, MIXES, Choice
from pymla.make.quantize_plan import make_plan
from pymla.make.recipe import read_rules, recipe_for
from pymla.reference.quant import dequantise
from pymla.reference.quant import quantise as quantise_by_definition


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model in BF16, with k_b and v_b."""
    return make_model(tmp_path_factory.mktemp("source") / "bf16.gguf", TINY, qtype="bf16", layout="split", seed=1)


@pytest.fixture(scope="module")
def imatrix(source):
    """An importance matrix of its layers but for one tensor, in which expert 1 counts most."""
    rng, entries = np.random.default_rng(0), {}
    for name, tensor in ModelFile.open(source).tensors.items():
        if name.startswith("blk.") and tensor.qtype == ggml.BF16 and name != "blk.1.ffn_down_shexp.weight":
            matrices = math.prod(tensor.shape[:-2])
            # An entry of k_b or v_b has the columns of all heads in one row.
            rows = matrices if "_exps" in name else 1
            sums = rng.uniform(0.1, 9, (rows, matrices // rows * tensor.shape[-1])).astype(np.float32)
            counts = np.full(rows, 64, np.int64)
            if rows > 1:
                counts[1] = 640
            entries[name] = Entry(sums * counts[:, None], counts)
    path = source.with_name("imatrix.gguf")
    Importance(entries, ["a text", "another"], 32).write(path)
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose rows are multiples of 256, for the most part."""
    shape = dataclasses.replace(TINY, hidden_size=256, num_hidden_layers=1, first_k_dense_replace=0)
    return make_model(tmp_path_factory.mktemp("wide") / "f16.gguf", shape, qtype="f16", layout="split")


def types(path):
    return {name: ggml.NAME[tensor.qtype] for name, tensor in ModelFile.open(path).tensors.items()}


def plan_of(run, *args):
    code, out, err = run("quantize", *args, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)


def weights(tensor):
    rows = tensor.data.reshape(-1, ggml.row_bytes(tensor.qtype, tensor.shape[-1]))
    return dequantise(rows, tensor.qtype).reshape(tensor.shape)


def test_every_name_is_known(run, source, tmp_path, imatrix):
    """Names of mixes, of types, and other names of them; nothing is written."""
    for name in (*MIXES, *ALIASES, "COPY", "q4_k_m", "Iq2_Xs"):
        found = plan_of(run, source, tmp_path / "out.gguf", name, "--imatrix", imatrix)
        assert found["refusals"] == [], name
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_is_written(run, source, tmp_path):
    out = tmp_path / "out.gguf"
    found = plan_of(run, source, out, "Q4_0")
    code, printed, err = run("quantize", source, out, "Q4_0")
    assert (code, printed) == (0, "")
    assert err.splitlines()[-1] == (
        f"{pymla_size(found['file_bytes'])}, {found['bits_per_weight']:.2f} bits per weight, "
        f"from {pymla_size(found['source_bytes'])}"
    )
    file = ModelFile.open(out)
    assert {each["name"]: each["to"] for each in found["tensors"]} == types(out)
    assert [each["bytes"] for each in found["tensors"]] == [each.data.nbytes for each in file.tensors.values()]
    assert found["bytes"] == sum(tensor.data.nbytes for tensor in file.tensors.values())
    assert found["file_bytes"] == out.stat().st_size
    assert found["weights"] == sum(int(np.prod(tensor.shape)) for tensor in file.tensors.values())
    assert sum(each["bytes"] for each in found["types"]) == found["bytes"]
    assert sum(each["tensors"] for each in found["types"]) == len(file.tensors)


def pymla_size(nbytes):
    from pymla.host.memory import size_text

    return size_text(nbytes)


def test_a_dry_run_for_people(run, wide, tmp_path):
    code, out, _ = run("quantize", wide, tmp_path / "out.gguf", "iq2_xxs", "--dry-run")
    assert code == 0
    words = " ".join(out.split())
    assert "Not possible: blk.0.attn_q_a.weight: IQ2_XXS needs an importance matrix (--imatrix)" in words
    assert re.search(r"blk\.0\.ffn_gate_inp\.weight \d+ × 256 F32 → F32 \S+ \S+ a router", words)
    assert "bits per weight" in words


def test_weights_are_those_of_the_quantiser(run, source, tmp_path):
    """Q8_0, whose codes follow from the weights; norms and routers as they are."""
    out = tmp_path / "out.gguf"
    assert run("quantize", source, out, "q8_0", "--tensor-type", "ffn_up=F16")[0] == 0
    was, is_now = ModelFile.open(source), ModelFile.open(out)
    for name, tensor in is_now.tensors.items():
        before = was.tensors[name]
        assert tensor.shape == before.shape
        if before.qtype == ggml.F32:
            assert tensor.qtype == ggml.F32
            np.testing.assert_array_equal(tensor.data, before.data)
        elif "ffn_up" in name:
            assert tensor.qtype == ggml.F16
            np.testing.assert_array_equal(weights(tensor), weights(before))
        else:
            largest = np.abs(weights(before)).max()
            assert np.abs(weights(tensor) - weights(before)).max() < largest / 127


def test_a_quantised_model_is_the_same_model(run, source, tmp_path):
    out = tmp_path / "out.gguf"
    assert run("quantize", source, out, "Q8_0")[0] == 0
    with pymla.load(out, device="cpu") as model:
        text = model.generate("abc", max_tokens=6, temperature=0)
        logits = model.logits(np.arange(1, 20, dtype=np.int32))
    assert text
    with pymla.load(source, device="reference") as model:
        expected = model.logits(np.arange(1, 20, dtype=np.int32))
    # Experts of a random model may be chosen differently after rounding.
    assert np.corrcoef(logits[-1].ravel(), expected[-1].ravel())[0, 1] > 0.95


def test_metadata(run, source, imatrix, tmp_path):
    """Copied byte for byte but for what says how the file was made; that is as llama-quantize writes it."""
    out = tmp_path / "out.gguf"
    assert run("quantize", source, out, "Q4_0", "--imatrix", imatrix)[0] == 0
    was, now = gguf.GGUFReader(source).fields, gguf.GGUFReader(out).fields
    added = {key: now[key].contents() for key in now if key not in was}
    assert added == {
        "quantize.imatrix.file": str(imatrix)[:127],
        "quantize.imatrix.dataset": "a text",
        "quantize.imatrix.entries_count": len(Importance.read(imatrix).entries),
        "quantize.imatrix.chunks_count": 20,
    }
    assert now["general.file_type"].contents() == 2
    assert now["general.quantization_version"].contents() == 2
    changed = ("general.file_type", "general.quantization_version", "GGUF.kv_count")
    for key in set(was) - set(changed):
        assert now[key].types == was[key].types
        assert now[key].contents() == was[key].contents(), key


def test_kinds_of_numbers_stay(tmp_path):
    """Metadata whose kinds Python's numbers do not tell."""
    path, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_uint64("some.uint64", 1 << 40)
    writer.add_int32("some.int32", -3)
    writer.add_float64("some.float64", 0.1)
    writer.add_array("some.bools", [True, False])
    writer.add_uint32("deepseek2.block_count", 1)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize.write(make_plan(ModelFile.open(path), recipe_for("copy")), out)
    was, now = gguf.GGUFReader(path).fields, gguf.GGUFReader(out).fields
    for key in [key for key in was if key.startswith("some.")]:
        assert (now[key].types, now[key].contents()) == (was[key].types, was[key].contents())
    assert "general.file_type" not in now


def test_importance_changes_codes(run, source, imatrix, tmp_path):
    """And --exclude-weights and --include-weights choose where it does."""
    outs = {}
    for name, options in {
        "without": [],
        "with": ["--imatrix", imatrix],
        "excluded": ["--imatrix", imatrix, "--exclude-weights", "exps"],
        "included": ["--imatrix", imatrix, "--include-weights", "exps"],
    }.items():
        out = tmp_path / f"{name}.gguf"
        # Without imatrix the mix itself would be another one.
        assert run("quantize", source, out, "Q4_0", "--pure", *options)[0] == 0
        outs[name] = {name: tensor.data.tobytes() for name, tensor in ModelFile.open(out).tensors.items()}
    quantised = [name for name in outs["with"] if outs["with"][name] != outs["without"][name]]
    assert {"blk.0.attn_q_a.weight", "blk.1.ffn_up_exps.weight", "blk.1.attn_k_b.weight"} <= set(quantised)
    assert "blk.1.ffn_down_shexp.weight" not in quantised
    for name in quantised:
        experts = "exps" in name
        assert outs["excluded"][name] == outs["without" if experts else "with"][name]
        assert outs["included"][name] == outs["with" if experts else "without"][name]


def test_importance_lowers_the_error_that_it_weighs(source, imatrix, tmp_path):
    importance, file = Importance.read(imatrix), ModelFile.open(source)
    errors = []
    for given in (importance, None):
        out = tmp_path / "out.gguf"
        quantize.write(make_plan(file, recipe_for("Q4_0", pure=True), given), out)
        name = "blk.1.ffn_gate_exps.weight"
        difference = weights(ModelFile.open(out).tensors[name]) - weights(file.tensors[name])
        columns = importance.columns(name, file.tensors[name].shape)
        errors.append(float((difference.astype(np.float64) ** 2 * columns[:, None]).sum()))
    assert errors[0] < errors[1]


def test_notes_name_what_the_importance_matrix_lacks(run, source, imatrix, tmp_path):
    _, _, err = run(
        "quantize", source, tmp_path / "o", "Q4_0", "--imatrix", imatrix, "--dry-run", "--tensor-type", "z=F16"
    )
    lines = err.splitlines()
    assert lines == [
        f"note: {imatrix}: has nothing for blk.1.ffn_down_shexp.weight, whose weights count alike",
        "note: rule 'z=F16' matches no tensor that is quantised",
    ]


def test_types_of_few_bits_need_an_importance_matrix(refused, wide, imatrix, tmp_path):
    parts = ["blk.0.attn_q_a.weight: IQ2_XXS needs an importance matrix (--imatrix)"]
    line = refused("quantize", wide, tmp_path / "out.gguf", "IQ2_XXS", parts=parts)
    assert line.endswith("(--imatrix)")
    # It is of another model.
    refused(
        *("quantize", wide, tmp_path / "out.gguf", "IQ2_XXS", "--imatrix", imatrix), parts=[imatrix, "another model"]
    )
    assert not (tmp_path / "out.gguf").exists()


def test_quantised_tensors_are_not_quantised_again(run, refused, source, tmp_path):
    first, second = tmp_path / "q8_0.gguf", tmp_path / "q4_0.gguf"
    assert run("quantize", source, first, "Q8_0")[0] == 0
    refused("quantize", first, second, "Q4_0", parts=[first, "token_embd.weight is Q8_0 already", "--allow-requantize"])
    assert not second.exists()
    assert run("quantize", first, second, "Q4_0", "--allow-requantize")[0] == 0
    assert types(second)["blk.1.ffn_up_exps.weight"] == "Q4_0"
    # What keeps its type is copied.
    copy = tmp_path / "copy.gguf"
    assert run("quantize", first, copy, "Q8_0")[0] == 0
    was, now = ModelFile.open(first), ModelFile.open(copy)
    assert [each.data.tobytes() for each in was.tensors.values()] == [
        each.data.tobytes() for each in now.tensors.values()
    ]


def test_copy(run, source, tmp_path):
    out = tmp_path / "out.gguf"
    assert run("quantize", source, out, "COPY")[0] == 0
    was, now = ModelFile.open(source), ModelFile.open(out)
    assert now.metadata["general.file_type"] == was.metadata["general.file_type"]
    for name, tensor in was.tensors.items():
        assert now.tensors[name].data.tobytes() == tensor.data.tobytes()


def test_parts_stay_parts(run, source, tmp_path):
    """Any part stands for all; without --keep-split they become one file."""
    file = ModelFile.open(source)
    tensors = [
        NewTensor(each.name, each.shape, each.qtype, lambda each=each: file.read(each))
        for each in file.tensors.values()
    ]
    parts = in_parts(tmp_path / "in", file.encoded_metadata(), [tensors[:5], tensors[5:6], tensors[6:]])
    write_files(parts)
    assert run("quantize", parts[1].path, tmp_path / "out.gguf", "Q8_0", "--keep-split")[0] == 0
    assert run("quantize", parts[0].path, tmp_path / "whole.gguf", "Q8_0")[0] == 0
    split, whole = ModelFile.open(tmp_path / "out-00002-of-00003.gguf"), ModelFile.open(tmp_path / "whole.gguf")
    assert len(whole.parts) == 1
    assert "split.count" not in whole.metadata
    assert not (tmp_path / "out.gguf").exists()
    counts = [sum(tensor.path == part for tensor in split.tensors.values()) for part in split.parts]
    assert counts == [5, 1, len(tensors) - 6]
    for name, tensor in whole.tensors.items():
        assert split.tensors[name].data.tobytes() == tensor.data.tobytes()


def test_interleaved_and_block_types_can_be_read(tmp_path):
    """A type of four rows together, and one with row headers, as sources."""
    shape = dataclasses.replace(TINY, hidden_size=256, num_hidden_layers=1, first_k_dense_replace=0, vocab_size=304)
    for qtype in ("q8_0_r8", "iq4_ks"):
        path, out = make_model(tmp_path / f"{qtype}.gguf", shape, qtype=qtype), tmp_path / "out.gguf"
        plan = make_plan(ModelFile.open(path), recipe_for("F32"), allow_requantize=True)
        quantize.write(plan, out)
        name = "blk.0.ffn_gate_exps.weight"
        np.testing.assert_array_equal(weights(ModelFile.open(out).tensors[name]), weights(plan.file.tensors[name]))


def test_weights_that_are_not_finite_are_refused(refused, source, tmp_path):
    file, bad = ModelFile.open(source), tmp_path / "bad.gguf"
    name = "blk.1.attn_output.weight"
    start = source.read_bytes().index(file.tensors[name].data.tobytes())
    data = bytearray(source.read_bytes())
    data[start + 100 : start + 102] = b"\x80\x7f"  # infinity
    bad.write_bytes(data)
    refused("quantize", bad, tmp_path / "out.gguf", "Q8_0", parts=[name])
    with pytest.raises(PymlaError, match=f"{name} holds weights that are NaN or infinite"):
        make_plan(ModelFile.open(bad), recipe_for("Q8_0"), size=10**8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["Q9_K"], ["unknown type or mix 'Q9_K'; choose F32"]),
        ([], ["give TYPE or --target-size"]),
        (["Q8_0", "--target-size", "1G"], ["give TYPE or --target-size"]),
        (["--target-size", "much"], ["'much' is no size"]),
        (["Q8_0", "--json"], ["--dry-run"]),
        (["Q8_0", "--recipe-out", "r"], ["--target-size"]),
        (["Q8_0", "--tensor-type", "ffn"], ["--tensor-type: 'ffn' is no rule"]),
        (["Q8_0", "--tensor-type", "ffn=Q9"], ["--tensor-type: unknown type 'Q9'"]),
        (["Q8_0", "--output-type", "Q9"], ["--output-tensor-type: unknown type 'Q9'"]),
        (["Q8_0", "--recipe", "missing.txt"], ["missing.txt: No such file"]),
        (["Q8_0", "--imatrix", "missing.gguf"], ["missing.gguf: cannot be opened"]),
        (["Q8_0", "--include-weights", "a"], ["--imatrix"]),
        (["Q8_0", "--include-weights", "a", "--exclude-weights", "b"], ["not both"]),
        (["COPY", "--pure"], ["COPY changes no type"]),
    ],
)
def test_wrong_options(refused, source, tmp_path, options, parts):
    refused("quantize", source, tmp_path / "out.gguf", *options, parts=parts)
    assert not list(tmp_path.iterdir())


def test_wrong_files(refused, source, tmp_path):
    refused("quantize", tmp_path / "missing.gguf", tmp_path / "out.gguf", "Q8_0", parts=["missing.gguf"])
    refused("quantize", source, source, "Q8_0", parts=[source])
    other = tmp_path / "llama.gguf"
    metadata = {"llama.block_count": 1}
    gguf_writer.write(
        other, "llama", metadata, [NewTensor("output.weight", (1, 32), ggml.F32, lambda: [np.ones(32, np.float32)])]
    )
    refused("quantize", other, tmp_path / "out.gguf", "Q8_0", parts=["architecture 'llama'", "deepseek2"])


# Target size ----------------------------------------------------------------------------------------------------------


def test_a_target_size_is_kept_and_used(run, source, imatrix, tmp_path):
    """The file is no larger, and by less than the smallest step smaller; its recipe makes the same file again."""
    out, again, recipe = tmp_path / "out.gguf", tmp_path / "again.gguf", tmp_path / "recipe.txt"
    smallest = plan_of(run, source, out, "Q4_0", "--pure")["file_bytes"]
    largest = plan_of(run, source, out, "Q8_0", "--pure")["file_bytes"]
    size = (smallest + largest) // 2
    options = "--imatrix", imatrix, "--target-size", size
    code, _, err = run("quantize", source, out, *options, "--recipe-out", recipe)
    assert code == 0, err
    assert 0.98 * size < out.stat().st_size <= size
    assert run("quantize", source, again, "Q4_0", "--imatrix", imatrix, "--recipe", recipe)[0] == 0
    assert types(again) == types(out)
    found = plan_of(run, source, out, *options)
    assert found["target"]["least_error"] <= found["target"]["error"] < 1.05 * found["target"]["least_error"]
    # With rules, the other tensors share what is left.
    ruled = plan_of(run, source, out, *options, "--tensor-type", "exps=Q8_0", "--output-type", "Q4_0")
    by_name = {each["name"]: each["to"] for each in ruled["tensors"]}
    assert {qtype for name, qtype in by_name.items() if "exps" in name} == {"Q8_0"}
    assert by_name["output.weight"] == "Q4_0"
    assert ruled["file_bytes"] <= size


def test_a_size_that_is_too_small(run, source, tmp_path):
    code, _, err = run("quantize", source, tmp_path / "out.gguf", "--target-size", "10K")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert err.splitlines()[-1].startswith("pymla: error: --target-size: the smallest types take ")


def test_a_size_with_room_for_the_model_as_it_is(run, source, tmp_path):
    found = plan_of(run, source, tmp_path / "out.gguf", "--target-size", "1G")
    assert {each["to"] for each in found["tensors"]} == {"BF16", "F32"}
    assert found["target"] == {"error": 0.0, "least_error": 0.0}


def test_relative_errors_are_those_of_the_definition(source, imatrix):
    """All rows of a small tensor are sampled; experts count as often as they were used."""
    importance, file = Importance.read(imatrix), ModelFile.open(source)
    for name, weight in (("blk.1.ffn_up_exps.weight", 1), ("output.weight", 2)):
        tensor = file.tensors[name]
        (measured,) = target_size.measure(
            [tensor], 2, "output.weight", importance, candidates=[ggml.Q8_0, ggml.IQ2_XXS]
        )
        assert list(measured.options) == [ggml.IQ4_NL, ggml.Q8_0, ggml.BF16]  # IQ2_XXS does not fit
        w = weights(tensor).astype(np.float64).reshape(-1, *tensor.shape[-2:])
        columns = importance.columns(name, tensor.shape)
        columns = np.ones((1, tensor.shape[-1])) if columns is None else columns
        uses = np.array([64, 640, *[64] * (len(w) - 2)]) if "exps" in name else np.ones(1)
        rounded = dequantise(quantise_by_definition(w.astype(np.float32), ggml.Q8_0), ggml.Q8_0)
        per_matrix = (uses[:, None, None] * columns[:, None], np.square(w - rounded), np.square(w))
        expected = weight * (per_matrix[0] * per_matrix[1]).sum() / (per_matrix[0] * per_matrix[2]).sum()
        option = measured.options[ggml.Q8_0]
        assert option.nbytes == -(-ggml.tensor_bytes(ggml.Q8_0, tensor.shape) // 32) * 32
        # The search for a scale lowers the error a little.
        assert 0.7 * expected < option.cost <= 1.001 * expected
        assert measured.options[ggml.BF16] == Option(tensor.data.nbytes, 0.0)
        assert measured.options[ggml.IQ4_NL].cost > 20 * option.cost


def test_an_expert_that_was_never_chosen_counts_like_one_chosen_once(source):
    """With inputs as those of the others: inputs of 1 would count more than all small inputs of the others."""
    (tensor,) = [each for name, each in ModelFile.open(source).tensors.items() if name == "blk.1.ffn_up_exps.weight"]
    experts, _, columns = tensor.shape
    sums = np.random.default_rng(0).uniform(1e-6, 9e-6, (experts, columns))
    counts = np.full(experts, 64, np.int64)
    sums[2], counts[2] = 0, 0
    never = Importance({tensor.name: Entry(sums, counts)})
    sums, counts = sums.copy(), counts.copy()
    sums[2], counts[2] = sums.sum(0) / counts.sum(), 1
    once = Importance({tensor.name: Entry(sums, counts)})
    found, expected = (
        target_size.measure([tensor], 2, "output.weight", each, candidates=[ggml.Q4_0])[0].options[ggml.Q4_0]
        for each in (never, once)
    )
    assert found.cost == pytest.approx(expected.cost, rel=1e-6)


def test_a_recipe_of_choices(tmp_path):
    names = [
        "blk.0.ffn_up.weight",
        "blk.2.ffn_up.weight",
        "blk.10.ffn_up.weight",
        "blk.1.ffn_up.weight",
        "output.weight",
    ]
    qtypes = [ggml.Q4_K, ggml.Q4_K, ggml.Q4_K, ggml.Q6_K, ggml.Q6_K]
    odd = {"blk.1.a#(b).weight": ggml.Q8_0}
    choices = dict(zip(names, qtypes, strict=True)) | odd
    text = target_size.recipe_text({name: Choice(qtype, "") for name, qtype in choices.items()}, "found")
    assert text.splitlines() == [
        "# found",
        r"^blk\.(0|2|10)\.ffn_up\.weight$ = Q4_K",
        r"^blk\.(1)\.ffn_up\.weight$ = Q6_K",
        r"^output\.weight$ = Q6_K",
        r"^blk\.(1)\.a\x23\(b\)\.weight$ = Q8_0",
    ]
    path = tmp_path / "recipe.txt"
    path.write_text(text)
    for name, qtype in choices.items():
        assert [rule.qtype for rule in read_rules(path) if rule.pattern.search(name)] == [qtype]


def test_small_tensors_get_more_bits_than_large_ones():
    """Of tensors with the same error at the same type, a byte brings more in the smaller one."""
    errors = {ggml.Q4_0: 1e-2, ggml.Q5_0: 3e-3, ggml.Q8_0: 5e-5}

    def measured(name, rows):
        return target_size.Measured(
            name, {qtype: Option(ggml.tensor_bytes(qtype, (rows, 64)), error) for qtype, error in errors.items()}
        )

    tensors = [measured("large", 64000), measured("small", 640)]
    limit = ggml.tensor_bytes(ggml.Q5_0, (64640, 64)) - 1
    found = target_size.choose(tensors, limit)
    assert {name: ggml.NAME[choice.qtype] for name, choice in found.choices.items()} == {
        "large": "Q4_0",
        "small": "Q8_0",
    }
    assert found.nbytes <= limit
    with pytest.raises(PymlaError, match="the smallest types take"):
        target_size.choose(tensors, 1000)
