"""Against llama-perplexity's figures for the same files and text (tools/golden_perplexity.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import question_files
from golden_perplexity import quantised_copy

import pymla
from pymla.cli.perplexity_report import statistics_text
from pymla.files import kl_base
from pymla.make import choices, kl_divergence, perplexity

GOLDEN = Path(__file__).parent / "golden"
RECORD = json.loads((GOLDEN / "perplexity.json").read_text(encoding="utf-8"))
ABOUT, RESULTS = RECORD["provenance"], RECORD["results"]
CTX, CHUNKS = ABOUT["ctx"], ABOUT["chunks"]
TEXT = question_files.TEXT.read_text()


@pytest.fixture(scope="module")
def v3():
    """In float32, as there."""
    with pymla.load(GOLDEN / "v3.gguf", device="cpu", cache_type="f32", ctx=CTX, cache_tokens=256) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def demo():
    with pymla.load(device="cpu", cache_type="f32", ctx=512, cache_tokens=2048) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The file that was compared there: the same in Q4_0."""
    return quantised_copy(GOLDEN / "v3.gguf", tmp_path_factory.mktemp("small") / "v3-q4_0.gguf")


def running(loaded, windows):
    """Perplexities after each window."""
    losses = list(perplexity.window_losses(loaded.model, windows))
    return [perplexity.perplexity(losses[: i + 1]) for i in range(len(losses))]


def test_perplexity_in_float32(v3):
    found = running(v3, perplexity.cut(v3.tokenize(TEXT), CTX, v3.tokenizer, CHUNKS))
    assert [each.value for each in found] == pytest.approx(RESULTS["v3"]["running"], rel=1e-4)
    assert found[-1] == pytest.approx(RESULTS["v3"]["final"], rel=1e-4)


def test_perplexity_of_the_demo_model(demo):
    """Both round activations to 8 bits, each in its own way."""
    windows = perplexity.cut(demo.tokenize(TEXT), ABOUT["demo_ctx"], demo.tokenizer)
    found = running(demo, windows)
    assert len(found) == len(RESULTS["demo"]["running"])
    assert found[-1].value == pytest.approx(RESULTS["demo"]["final"][0], rel=2e-3)
    assert found[-1].error == pytest.approx(RESULTS["demo"]["final"][1], rel=2e-2)


def test_a_stride(v3):
    """llama-perplexity has BOS in front of the first window alone, as the text has it: in the others it puts it there
    when the window has been read."""
    windows = perplexity.cut(v3.tokenize(TEXT), CTX, v3.tokenizer, CHUNKS, ABOUT["stride"])
    found = [each.value for each in running(v3, windows._replace(bos=None))]
    assert found == pytest.approx(RESULTS["v3-stride"]["running"], rel=1e-4)
    assert running(v3, windows)[0].value == pytest.approx(RESULTS["v3-stride"]["running"][0], rel=1e-4)


def test_its_file_is_written_here(v3, tmp_path):
    """The same but for rounding: header and tokens are equal, and so are nearly all codes."""
    windows = perplexity.cut(v3.tokenize(TEXT), CTX, v3.tokenizer, CHUNKS)
    with kl_base.writing(tmp_path / "base", windows.tokens, v3.config.vocab_size) as base:
        list(perplexity.window_losses(v3.model, windows, base))
    ours, theirs = (tmp_path / "base").read_bytes(), (GOLDEN / "perplexity.kld").read_bytes()
    assert len(ours) == len(theirs)
    head = 20 + windows.tokens.nbytes
    assert ours[:head] == theirs[:head]
    pair = [np.frombuffer(each[head:], "<u2").reshape(-1, kl_base.record_words(288)) for each in (ours, theirs)]
    numbers = [np.ascontiguousarray(each[:, :4]).view("<f4") for each in pair]
    np.testing.assert_allclose(*numbers, rtol=1e-4)
    assert np.abs(pair[0][:, 4:].astype(int) - pair[1][:, 4:]).max() <= 8  # 5e-4 at most


def test_its_file_is_compared_here(v3, small):
    """With the model itself, and with the copy that was compared there."""
    with kl_base.BaseFile(GOLDEN / "perplexity.kld") as base:
        kl_divergence.check_same(base, v3.config.vocab_size, CTX, v3.tokenize(TEXT))
        windows = kl_divergence.windows_of(base, perplexity.bos_of(v3.tokenizer))
        own = kl_divergence.statistics(list(kl_divergence.compare_windows(v3.model, windows, base)))
        with pymla.load(small, device="cpu", cache_type="f32", ctx=CTX, cache_tokens=256) as loaded:
            found = kl_divergence.statistics(list(kl_divergence.compare_windows(loaded.model, windows, base)))
    assert abs(own.divergence.mean.value) < 1e-5
    assert own.same_top.value == 1
    expected = RESULTS["comparison"]
    # Exactly what the file says.
    assert found.base_perplexity == pytest.approx(expected["Mean PPL(base)"], rel=1e-5)
    # Q4_0: activations are rounded to 8 bits on both sides, not in the same way.
    for name, value in (
        ("Mean PPL(Q)", found.perplexity),
        ("Mean ln(PPL(Q)/PPL(base))", found.log_ratio),
        ("Mean PPL(Q)/PPL(base)", found.ratio),
        ("Mean PPL(Q)-PPL(base)", found.difference),
        ("Mean KLD", found.divergence.mean),
    ):
        wanted, error = expected[name]
        assert abs(value.value - wanted) < error, name
        assert value.error == pytest.approx(error, rel=0.2), name
    for name, value in (
        ("Mean Δp", found.probability.mean),
        ("RMS Δp", found.probability_rms),
        ("Same top p", found.same_top),
    ):
        wanted, error = expected[name]
        assert abs(100 * value.value - wanted) < error, name


def test_names_of_statistics_are_its_own(v3):
    with kl_base.BaseFile(GOLDEN / "perplexity.kld") as base:
        windows = kl_divergence.windows_of(base, perplexity.bos_of(v3.tokenizer), 1)
        found = kl_divergence.statistics(list(kl_divergence.compare_windows(v3.model, windows, base)))
    names = {line.split(":")[0].strip() for line in statistics_text(found).splitlines() if line}
    assert set(RESULTS["comparison"]) - names == set()


def shares(loaded, questions):
    """Running shares in per cent."""
    tasks = [choices.tokenised(question, loaded.tokenizer) for question in questions]
    scores = list(choices.answer_scores(loaded.model, tasks))
    return [100 * choices.score(tasks, scores[: i + 1]).share for i in range(len(scores))]


def test_questions(demo):
    """The same tasks in the same order, with the same answers."""
    made = question_files.questions(TEXT, ABOUT["tasks"])
    path = Path("tasks")
    hellaswag = choices.read_hellaswag(question_files.hellaswag(made), path)
    assert shares(demo, choices.shuffled(hellaswag, None)) == pytest.approx(RESULTS["hellaswag"], abs=1e-4)
    binary = choices.read_multiple_choice(question_files.multiple_choice(made), path)
    assert shares(demo, binary) == pytest.approx(RESULTS["multiple-choice"], abs=1e-4)
    assert shares(demo, choices.sampled(binary, 12)) == pytest.approx(RESULTS["multiple-choice-12"], abs=1e-4)
    winogrande = choices.read_winogrande(question_files.winogrande(), path)
    assert shares(demo, winogrande) == pytest.approx(RESULTS["winogrande"], abs=1e-4)
