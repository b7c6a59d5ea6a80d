"""Against llama-perplexity's figures for the same files and text (tools/golden_perplexity.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import question_files
from golden_perplexity import quantised_copy

import pymla
from pymla import ggml
from pymla.cli.perplexity_report import statistics_text
from pymla.files import kl_base
from pymla.make import choices, kl_divergence, perplexity
from pymla.make.perplexity import Mean

GOLDEN = Path(__file__).parent / "golden"
RECORD = json.loads((GOLDEN / "perplexity.json").read_text(encoding="utf-8"))
ABOUT, RESULTS = RECORD["provenance"], RECORD["results"]
CTX, CHUNKS = ABOUT["ctx"], ABOUT["chunks"]
TEXT = question_files.TEXT.read_text()
#: The sentence of Winogrande of which the word in question counts, as little follows it.
WORD_COUNTS = 5


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
    """The file that was compared there: the same in Q8_0."""
    return quantised_copy(GOLDEN / "v3.gguf", tmp_path_factory.mktemp("small") / "v3-q8_0.gguf")


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


def test_a_stride():
    """llama-perplexity has BOS in front of the first window alone, as the text has it: in the others it puts it there
    when the window has been read. Few tokens count, and activations are rounded
    to 8 bits there."""
    with pymla.load(device="reference", cache_type="f32", ctx=256) as loaded:
        windows = perplexity.cut(loaded.tokenize(TEXT), ABOUT["demo_ctx"], loaded.tokenizer, 2, ABOUT["stride"])
        found = [each.value for each in running(loaded, windows._replace(bos=None))]
    assert found == pytest.approx(RESULTS["stride"][:2], rel=7e-3)


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
    assert found.base_perplexity == pytest.approx(RESULTS["comparison"]["Mean PPL(base)"], rel=1e-5)
    # Of random weights: a rounding changes which experts a token takes, and then all probabilities.
    for name, value in (("Mean PPL(Q)", found.perplexity), ("Mean KLD", found.divergence.mean)):
        wanted, error = RESULTS["comparison"][name]
        assert abs(value.value - wanted) < 2 * error, name


def assert_within_errors(found, expected):
    """Statistics differ by less than their errors, which are nearly the same."""
    percent = Mean(*(100 * each for each in found.probability_rms)), Mean(*(100 * each for each in found.same_top))
    for name, value in (
        ("Mean PPL(Q)", found.perplexity),
        ("Mean ln(PPL(Q)/PPL(base))", found.log_ratio),
        ("Mean PPL(Q)/PPL(base)", found.ratio),
        ("Mean PPL(Q)-PPL(base)", found.difference),
        ("Mean KLD", found.divergence.mean),
        ("RMS Δp", percent[0]),
        ("Same top p", percent[1]),
    ):
        wanted, error = expected[name]
        assert abs(value.value - wanted) < error, name
        assert value.error == pytest.approx(error, rel=0.3), name


def test_a_comparison_of_the_demo_model(demo, tmp_path):
    """Each program with a base of its own."""
    windows = perplexity.cut(demo.tokenize(TEXT), ABOUT["demo_ctx"], demo.tokenizer, CHUNKS)
    with kl_base.writing(tmp_path / "base", windows.tokens, demo.config.vocab_size) as base:
        list(perplexity.window_losses(demo.model, windows, base))
    small = quantised_copy(demo.file.path, tmp_path / "demo-q4_0.gguf", ggml.Q4_0)
    loading = {"device": "cpu", "cache_type": "f32", "ctx": 256, "cache_tokens": 1024}
    with pymla.load(small, **loading) as loaded, kl_base.BaseFile(tmp_path / "base") as base:
        found = kl_divergence.statistics(list(kl_divergence.compare_windows(loaded.model, windows, base)))
    expected = RESULTS["demo comparison"]
    assert_within_errors(found, expected)
    assert found.correlation == pytest.approx(expected["Cor(ln(PPL(Q)), ln(PPL(base)))"][0] / 100, abs=0.01)
    for share in (10, 50, 90):
        name = "Median KLD" if share == 50 else f"{share:.1f}% KLD"
        assert found.divergence.percentiles[share] == pytest.approx(expected[name][0], rel=0.2), name


def test_names_of_statistics_are_its_own(v3):
    with kl_base.BaseFile(GOLDEN / "perplexity.kld") as base:
        windows = kl_divergence.windows_of(base, perplexity.bos_of(v3.tokenizer), 1)
        found = kl_divergence.statistics(list(kl_divergence.compare_windows(v3.model, windows, base)))
    names = {line.split(":")[0].strip() for line in statistics_text(found).splitlines() if line}
    assert set(RESULTS["comparison"]) - names == set()


def answers(loaded, questions):
    """The share in per cent after each task, and the scores of all answers."""
    tasks = [choices.tokenised(question, loaded.tokenizer) for question in questions]
    scores = list(choices.answer_scores(loaded.model, tasks))
    return [100 * choices.score(tasks, scores[: i + 1]).share for i in range(len(scores))], scores


def test_questions(demo):
    """The same tasks in the same order, with the same answers."""
    made, path, count = question_files.questions(TEXT, ABOUT["tasks"]), Path("tasks"), ABOUT["tasks"]
    hellaswag = choices.read_hellaswag(question_files.hellaswag(made), path)
    binary = choices.read_multiple_choice(question_files.multiple_choice(made), path)
    for name, taken in (
        (f"hellaswag {count}", choices.shuffled(hellaswag, None)),
        (f"multiple-choice {count}", binary),
        (f"multiple-choice {count // 2}", choices.sampled(binary, count // 2)),
    ):
        shares, _ = answers(demo, taken)
        assert shares == pytest.approx([share for (share,) in RESULTS[name]], abs=1e-4), name


def test_sentences(demo):
    """Scores where what follows the word in question counts; where the word does, llama-perplexity has the second one's
    from a row of logits of the first."""
    found = choices.read_winogrande(question_files.winogrande(), Path("tasks"))
    shares, scores = answers(demo, found)
    expected = RESULTS[f"winogrande {len(found)}"]
    for i, (_, *pair) in enumerate(expected[:-1]):  # it reads the last sentence with its quotes twice
        known = 1 if i == WORD_COUNTS else 2
        np.testing.assert_allclose(scores[i][:known], pair[:known], rtol=0, atol=0.05)
    mine, theirs = (
        np.diff(np.array(each) * np.arange(1, 9), prepend=0) for each in (shares, [row[0] for row in expected])
    )
    others = np.arange(8) != WORD_COUNTS
    np.testing.assert_allclose(mine[others], theirs[others], atol=0.01)
