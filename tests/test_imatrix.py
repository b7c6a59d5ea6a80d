"""Collecting importance matrices: against the definition (tests/matrix_inputs.py), and as a command."""

import dataclasses
import math
import re
import signal
import time

import make_imatrix_golden
import numpy as np
import pytest
from compare import assert_close
from make_golden import SPARSE_SHAPES
from make_model import PRESETS, make_model
from matrix_inputs import MatrixInputs
from test_cli import model, refused, run  # noqa: F401 - fixtures
from test_golden import GOLDEN, with_layout
from test_interrupts import started

import pymla
from pymla.cli import interrupt
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.make.imatrix import Collector, Perplexity, chunks_of, collect
from pymla.make.importance import Importance
from pymla.models.tensors import model_tensors
from pymla.reference.quant import dequantise

#: The cache is float32 on the reference, too; the CPU adds in another order.
TOLERANCE = {"reference": 1e-5, "cpu": 1e-4}
#: Without q-LoRA; with groups of experts; with gate and up in one tensor; sparse; a dense network without a gate.
NAMES = ("v2-lite", "v3", "mistral4", "v3.2", "tiny-plm")


def collected(path, chunks, device="cpu"):
    """The entries of a model on some chunks."""
    dtype = np.float64 if device == "reference" else np.float32
    with pymla.load(path, device=device, mla="1", cache_type="f32", ctx=128) as language_model:
        collector = Collector(language_model.model, language_model.file, 128, process_output=True, dtype=dtype)
        for tokens in chunks:
            collector.read(tokens)
        return collector.importance(["text"], 64)


def chunks_for(path, count=1, tokens=60):
    vocabulary = ModelFile.open(path).tensors["token_embd.weight"].shape[0]
    return np.random.default_rng(3).integers(0, vocabulary, (count, tokens)).astype(np.int32)


def assert_equal(importance, sums, counts, rtol_max):
    assert set(importance.entries) == set(sums)
    for name, entry in importance.entries.items():
        np.testing.assert_array_equal(entry.counts, counts[name], name)
        assert_close(entry.sums, sums[name], rtol_max=rtol_max, reason=f"{name}: float32 cache, order of summation")


@pytest.fixture(scope="module")
def defined(tmp_path_factory):
    """A model's path, chunks, and sums and counts by the definition."""
    found = {}

    def get(name):
        if name not in found:
            path = GOLDEN / f"{name}.gguf"
            if name not in SPARSE_SHAPES and name.startswith("tiny"):
                path = make_model(tmp_path_factory.mktemp("made") / "m.gguf", PRESETS[name], layers=2, qtype="f32")
            chunks = chunks_for(path)
            inputs = MatrixInputs(path, chunks[0])
            found[name] = path, chunks, inputs.sums, inputs.counts
        return found[name]

    return get


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_of_every_matrix(defined, name, device):
    path, chunks, sums, counts = defined(name)
    importance = collected(path, chunks, device)
    assert_equal(importance, sums, counts, TOLERANCE[device])
    # Every matrix that a quantiser may quantise, but for the embeddings.
    file = ModelFile.open(path)
    with pymla.load(path, device="reference", ctx=64) as language_model:
        specs = model_tensors(language_model.config, file.tensors)
    matrices = {spec.name for spec in specs if not spec.is_vector} - {"token_embd.weight"}
    assert matrices <= set(importance.entries)


@pytest.mark.parametrize("layout", ["split", "all"])
def test_layouts_have_the_same_entries(defined, layout, tmp_path):
    path, chunks, sums, counts = defined("v3")
    importance = collected(with_layout(path, tmp_path / "m.gguf", layout), chunks)
    assert_equal(importance, sums, counts, TOLERANCE["cpu"])
    file = ModelFile.open(tmp_path / "m.gguf")
    for stem, k in (("attn_k_b", 32), ("attn_v_b", 32)):
        shape = file.tensors[f"blk.1.{stem}.weight"].shape
        columns = importance.columns(f"blk.1.{stem}.weight", shape)
        expected = sums[f"blk.1.{stem}.weight"].reshape(-1, k) / 60
        assert_close(
            columns, expected if layout == "split" else expected.mean(0)[None], rtol_max=1e-4, reason="float32"
        )


def test_an_indexer_that_need_not_run(defined):
    """Its matrices have entries even where no token sees more positions than are chosen."""
    path, chunks, *_ = defined("v3.2")
    importance = collected(path, chunks[:, :8])
    for indexer, same in (("attn_k", "attn_kv_a_mqa"), ("proj", "attn_q_a"), ("attn_q_b", "attn_q_b")):
        entry = importance.entries[f"blk.0.indexer.{indexer}.weight"]
        assert entry.sums is importance.entries[f"blk.0.{same}.weight"].sums
        assert entry.counts.tolist() == [8]


def test_a_quantised_model(tmp_path):
    """Sums are those of the numbers that go into the backend's products."""
    path = make_model(tmp_path / "m.gguf", "tiny", qtype="q8_0", layout="split", seed=1)
    chunks = chunks_for(path, tokens=20)
    on_cpu, reference = collected(path, chunks), collected(path, chunks, "reference")
    assert set(on_cpu.entries) == set(reference.entries)
    name = "blk.0.attn_q.weight" if "blk.0.attn_q.weight" in on_cpu.entries else "blk.0.attn_q_a.weight"
    embedded = ModelFile.open(path).tensors["token_embd.weight"]
    rows = dequantise(embedded.data.reshape(embedded.shape[0], -1), embedded.qtype)[chunks[0]]
    weight = ModelFile.open(path).tensors["blk.0.attn_norm.weight"].data.view(np.float32)
    with pymla.load(path, device="reference", ctx=64) as language_model:
        eps = language_model.config.rms_norm_eps
    normed = rows / np.sqrt((rows**2).mean(1, keepdims=True) + eps) * weight
    for each in (on_cpu, reference):
        assert_close(each.entries[name].sums[0], (normed**2).sum(0), rtol_max=1e-5, reason="float32")
    sums, expected = (each.entries["blk.0.attn_output.weight"].sums for each in (on_cpu, reference))
    assert_close(sums, expected, rtol_max=5e-2, reason="activations of 8 bits")


def test_chunks_add_up_and_an_interrupted_one_counts_nothing(defined, monkeypatch):
    path, chunks, sums, counts = defined("v2-lite")
    with pymla.load(path, device="cpu", mla="1", cache_type="f32", ctx=128) as language_model:
        collector = Collector(language_model.model, language_model.file, 128, process_output=True)
        collector.read(chunks[0])
        forward, passes = collector._model.forward, iter([KeyboardInterrupt])

        def interrupted(*arguments):
            forward(*arguments)
            for error in passes:
                raise error
            return forward(*arguments)

        monkeypatch.setattr(collector._model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collector.read(chunks[0])
        assert_equal(collector.importance(), sums, counts, TOLERANCE["cpu"])
        monkeypatch.undo()
        collector.read(chunks[0])
        assert collector.chunks == 2
        doubled = {name: 2 * each for name, each in sums.items()}
        assert_equal(collector.importance(), doubled, {name: 2 * each for name, each in counts.items()}, 1e-4)


def test_inputs_that_are_not_finite(defined):
    """The chunk is left out, and the message names a tensor."""
    path, chunks, *_ = defined("v2-lite")
    with pymla.load(path, device="cpu", mla="1", cache_type="f32", ctx=128) as language_model:
        collector = Collector(language_model.model, language_model.file, 128, process_output=True)
        collector.read(chunks[0])
        entries = collector.importance().entries
        weights = language_model.model.weights
        object.__setattr__(weights, "output_norm", np.full_like(weights.output_norm, np.inf))
        with pytest.raises(PymlaError, match=r"what output\.weight multiplies is not finite in chunk 2"):
            collector.read(chunks[0])
        assert collector.chunks == 1
        for name, entry in collector.importance().entries.items():
            np.testing.assert_array_equal(entry.sums, entries[name].sums)


def test_chunks_of_a_text():
    chunks = chunks_of(range(5, 5 + 33), 1, 8)
    assert chunks.dtype == np.int32
    np.testing.assert_array_equal(chunks[:, 0], [1] * 4)
    np.testing.assert_array_equal(chunks[2, 1:], range(5 + 17, 5 + 24))
    np.testing.assert_array_equal(chunks_of(range(33), None, 8, first=1, limit=2), np.arange(8, 24).reshape(2, 8))
    with pytest.raises(PymlaError, match=r"7 tokens, and a chunk 8.*`ctx`"):
        chunks_of(range(7), 1, 8)
    with pytest.raises(PymlaError, match="`from_chunk` is 4, and the text has 4 chunks"):
        chunks_of(range(33), 1, 8, first=4)


@pytest.mark.parametrize("tokens", [2, 3, 10, 101])
def test_perplexity_of_second_halves(tokens):
    rng = np.random.default_rng(tokens)
    perplexity, losses = Perplexity(), []
    for _ in range(3):
        logits, ids = rng.standard_normal((tokens, 7), dtype=np.float32) * 3, rng.integers(0, 7, tokens)
        perplexity.add(logits, ids)
        for t in range(tokens // 2, tokens - 1):
            shares = np.exp(logits[t].astype(np.float64))
            losses.append(-math.log(shares[ids[t + 1]] / shares.sum()))
    if losses:
        assert perplexity.estimate.value == pytest.approx(math.exp(np.mean(losses)))
        assert perplexity.estimate.error == pytest.approx(
            math.exp(np.mean(losses)) * np.std(losses) / math.sqrt(len(losses) - 1)
        )
    else:
        assert math.isnan(perplexity.estimate.value)
        assert math.isnan(perplexity.estimate.error)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text about nothing in particular\n" for i in range(40)))
    return path


def same(one, other, rtol=1e-6):
    one, other = Importance.read(one), Importance.read(other)
    assert one.entries.keys() == other.entries.keys()
    for name, entry in one.entries.items():
        np.testing.assert_array_equal(entry.counts, other.entries[name].counts)
        np.testing.assert_allclose(entry.sums, other.entries[name].sums, rtol=rtol)
    return one.chunks == other.chunks


def test_a_text_to_a_file(run, model, text, tmp_path):  # noqa: F811
    out = tmp_path / "i.gguf"
    code, printed, err = run("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 32, "--chunks", 3)
    assert code == 0, err
    assert re.fullmatch(r"perplexity \d+\.\d{4} ± \d+\.\d{4}\n", printed)
    assert f"{out}: " in err
    assert "3 chunks of 32 tokens" in err
    importance = Importance.read(out)
    assert (importance.chunks, importance.chunk_size, importance.datasets) == (3, 32, (str(text),))
    assert "output.weight" not in importance.entries
    unchosen = importance.never_chosen()
    assert err.count("never chosen") == len(unchosen)
    for layer, experts in unchosen.items():
        assert re.search(rf"note: {re.escape(layer)}: experts? {experts[0]}\b.* never chosen", err)


def test_resumed_and_merged_runs_equal_one(run, model, text, tmp_path):  # noqa: F811
    whole, part, rest = (tmp_path / f"{name}.gguf" for name in ("whole", "part", "rest"))
    common = "imatrix", "-m", model, "-f", text, "--ctx", 32, "--no-ppl", "--process-output"
    code, printed, _ = run(*common, "-o", whole, "--chunks", 5, "--save-every", 2)
    assert (code, printed) == (0, "")
    assert run(*common, "-o", part, "--chunks", 2)[0] == 0
    assert run(*common, "-o", rest, "--from-chunk", 2, "--chunks", 3)[0] == 0
    assert run("imatrix", "--in-file", part, "--in-file", rest, "-o", tmp_path / "sum.gguf")[0] == 0
    assert same(tmp_path / "sum.gguf", whole)
    # Into the file that it goes on from.
    assert run(*common, "-o", part, "--in-file", part, "--from-chunk", 2, "--chunks", 3)[0] == 0
    assert same(part, whole)
    assert Importance.read(part).datasets == (str(text),)
    # Through the older format, which has means only, and no counts of experts.
    assert run("imatrix", "--in-file", whole, "-o", tmp_path / "whole.dat")[0] == 0
    # One entry for all heads.
    assert run("imatrix", "--in-file", whole, "-o", tmp_path / "heads.gguf", "--merge-heads")[0] == 0
    sizes = [
        Importance.read(each).entries["blk.0.attn_v_b.weight"].sums.shape for each in (whole, tmp_path / "heads.gguf")
    ]
    rank = ModelFile.open(model).metadata["deepseek2.attention.kv_lora_rank"]
    assert sizes == [(1, rank * ModelFile.open(model).metadata["deepseek2.attention.head_count"]), (1, rank)]
    for name, entry in Importance.read(whole).entries.items():
        if entry.counts.all():
            shape = (*([entry.counts.size] if entry.counts.size > 1 else []), 1, entry.sums.shape[1])
            old, new = (Importance.read(each).columns(name, shape) for each in (tmp_path / "whole.dat", whole))
            if old is not None and "_k_b" not in name and "_v_b" not in name:
                np.testing.assert_allclose(old, new, rtol=1e-6)


def test_checkpoints(run, model, text, tmp_path, monkeypatch):  # noqa: F811
    """Every `--save-every` chunks the file has what was collected; an error keeps that, and what came after it."""
    out, seen, read = tmp_path / "i.gguf", [], Collector.read

    def failing(self, *arguments, **options):
        seen.append(Importance.read(out).chunks if out.exists() else 0)
        if len(seen) == 4:
            raise PymlaError("the weights went bad")
        return read(self, *arguments, **options)

    monkeypatch.setattr(Collector, "read", failing)
    code, _, err = run("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 32, "--save-every", 2, "--no-ppl")
    assert code == 2
    assert "the weights went bad" in err
    assert seen == [0, 0, 2, 2]
    assert Importance.read(out).chunks == 3


def test_an_interrupt_writes_what_was_collected(run, model, text, tmp_path, monkeypatch):  # noqa: F811
    out, count, read = tmp_path / "i.gguf", [], Collector.read

    def interrupted(self, *arguments, **options):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return read(self, *arguments, **options)

    monkeypatch.setattr(Collector, "read", interrupted)
    code, printed, err = run("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 32, "--from-chunk", 1)
    assert code == interrupt.CODE
    assert Importance.read(out).chunks == 2
    assert printed.startswith("perplexity ")
    assert "--from-chunk 3 goes on" in err


def test_ctrl_c(model, text, tmp_path):  # noqa: F811
    """In a process of its own."""
    out = tmp_path / "i.gguf"
    text.write_text("some words of a text " * 20_000)
    options = "-m", model, "-f", text, "-o", out, "--ctx", 32, "--save-every", 1, "--no-ppl"
    process = started("-m", "pymla", "imatrix", *map(str, options))
    end = time.monotonic() + 60
    while not out.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == interrupt.CODE, err
    assert "Traceback" not in err
    assert Importance.read(out).chunks >= 1
    assert not list(tmp_path.glob("*.part"))


def test_statistics_table(run, model, text, tmp_path):  # noqa: F811
    out = tmp_path / "i.gguf"
    assert run("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 32, "--chunks", 2, "--no-ppl")[0] == 0
    code, printed, err = run("imatrix", "--in-file", out, "--show-statistics")
    assert (code, err) == (0, "")
    lines = printed.splitlines()
    assert len([line for line in lines if " ffn_down_shexp " in line or " ffn_down " in line])
    assert lines[0].split()[:3] == ["Layer", "Tensor", "Σ(Act²)"]
    layers = ModelFile.open(model).metadata["deepseek2.block_count"]
    assert [int(line.split()[0]) for line in lines[-layers:]] == list(range(layers))


def test_what_is_refused(refused, model, text, tmp_path):  # noqa: F811
    out = tmp_path / "i.gguf"
    refused("imatrix", parts=["-o"])
    refused("imatrix", "-o", out, parts=["-f", "--in-file"])
    refused("imatrix", "-m", model, "-o", out, parts=["-f", str(model)])
    refused("imatrix", "--show-statistics", parts=["--in-file"])
    refused("imatrix", "-m", model, "-f", tmp_path / "none", "-o", out, parts=["none"])
    refused("imatrix", "-m", model, "-f", text, "-o", text, parts=[str(text), "-o"])
    refused("imatrix", "-m", model, "-f", text, "-o", model, parts=[str(model), "-o"])
    refused("imatrix", "--in-file", text, "-o", out, parts=[str(text), "importance matrix"])
    refused("imatrix", "--in-file", model, "-o", out, parts=[str(model), "no importance matrix", ".in_sum2"])
    refused("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 2048, "--device", "cpu", parts=["--ctx"])
    refused("imatrix", "-m", model, "-f", text, "-o", out, "--ctx", 32, "--from-chunk", 10**6, parts=["--from-chunk"])
    assert not out.exists()


def test_a_file_of_another_model(refused, run, model, text, tmp_path):  # noqa: F811
    """It is refused before anything is read."""
    other = tmp_path / "other.gguf"
    make_model(tmp_path / "m.gguf", dataclasses.replace(PRESETS["tiny-plm"], v_head_dim=64), layers=2, qtype="q8_0")
    arguments = "-f", text, "--ctx", 32, "--chunks", 1, "--no-ppl"
    assert run("imatrix", "-m", tmp_path / "m.gguf", "-o", other, *arguments)[0] == 0
    out = tmp_path / "i.gguf"
    refused("imatrix", "-m", model, "-o", out, "--in-file", other, *arguments, parts=["different models"])
    assert not out.exists()


def test_progress_of_collecting(defined):
    path, chunks, *_ = defined("v2-lite")
    told = []
    with pymla.load(path, device="cpu", mla="1", cache_type="f32", ctx=128) as language_model:
        perplexity = Perplexity()
        collect(
            Collector(language_model.model, language_model.file, 128),
            np.repeat(chunks, 2, axis=0),
            perplexity,
            lambda *each: told.append(each),
        )
    assert told == [(1, 2), (2, 2)]
    assert perplexity.estimate.value > 1


# The figures of llama.cpp ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", make_imatrix_golden.LAYOUTS)
def test_sums_equal_those_of_llama_cpp(layout, tmp_path, run):  # noqa: F811
    """Those of tools/make_imatrix_golden.py."""
    golden = Importance.read(GOLDEN / "imatrix" / f"{layout}.gguf")
    path, text = make_imatrix_golden.make(tmp_path / "m.gguf", layout), tmp_path / "text.txt"
    text.write_text(make_imatrix_golden.TEXT)
    options = "--ctx", make_imatrix_golden.CTX, "--process-output", "--device", "cpu"
    code, _, err = run("imatrix", "-m", path, "-f", text, "-o", tmp_path / "i.gguf", *options)
    assert code == 0, err
    importance = Importance.read(tmp_path / "i.gguf")
    assert (importance.chunks, importance.chunk_size) == (golden.chunks, golden.chunk_size)
    # What llama.cpp does not see in the layout is here in addition.
    more = {name.split(".")[2] for name in importance.entries.keys() - golden.entries.keys()}
    assert more == ({"attn_k_b", "attn_v_b"} if layout == "kv_b" else {"attn_kv_b"})
    assert golden.entries.keys() <= importance.entries.keys()
    for name, entry in golden.entries.items():
        own = importance.entries[name]
        np.testing.assert_array_equal(own.counts, entry.counts, name)
        assert_close(own.sums, entry.sums, rtol_max=1e-4, reason=f"{name}: float32 here and there")
    assert importance.never_chosen() == golden.never_chosen() != {}
