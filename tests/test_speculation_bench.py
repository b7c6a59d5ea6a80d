"""The benchmark of speculation, on little."""

import json

import pytest
import speculation
from click.testing import CliRunner
from make_model import make_model
from speculation_texts import Text

OPTIONS = ["--device", "reference", "--cache-type", "f32", "--repeat", "1"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("speculation") / "tiny.gguf", "tiny", qtype="q8_0", seed=1)


def test_gains_by_acceptance(path, tmp_path):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    little = ["--tokens", "12", "--depth", "4", "--lengths", "1,2", "--acceptance", "0,1", "--no-texts"]
    done = CliRunner().invoke(speculation.main, [str(path), *OPTIONS, *little, *files])
    assert done.exit_code == 0, done.output
    points = json.loads((tmp_path / "out.json").read_text())["by_acceptance"]
    assert [(point["acceptance"], point["length"]) for point in points] == [(a, n) for a in (0, 1) for n in (1, 2, 0)]
    assert [point["accepted"] for point in points] == [0, 0, 0, 1, 1, pytest.approx(1)]
    assert points[0]["tokens_per_step"] == 1
    assert points[4]["tokens_per_step"] == 3
    # Two tokens for the bytes of a step of two.
    assert 1 < points[3]["predicted"] < 2
    assert (tmp_path / "out.png").stat().st_size > 10000


def test_prompt_lookup_on_texts(monkeypatch, tmp_path):
    monkeypatch.setattr(speculation, "TEXTS", {"short": Text("def f(a, b):\n    return", " f(a, b)\n")})
    files = ["--json", str(tmp_path / "out.json")]
    done = CliRunner().invoke(speculation.main, [*OPTIONS, "--text-tokens", "6", *files])
    assert done.exit_code == 0, done.output
    model, author = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert (model["writer"], model["tokens"]) == ("model", 6)
    assert author["writer"] == "author"
    assert author["tokens_per_step"] >= 1


def test_a_text_that_differs_is_not_measured(path, monkeypatch):
    with speculation.pymla.load(path, device="reference", cache_type="f32", ctx=64) as language_model:
        bench = speculation.Bench(language_model, [1, 2, 3])
        oracle = speculation.Oracle([1, 2, 3, *bench.run(8).tokens], 1.0, language_model.config.vocab_size)
        bench.check(8, oracle, 3)
        verify = speculation.Speculation.verify

        def wrong(*args, **options):
            first, *others = verify(*args, **options)
            return [first._replace(token=first.token + 1), *others]

        monkeypatch.setattr(speculation.Speculation, "verify", wrong)
        with pytest.raises(speculation.PymlaError, match=r"token 0 is \d+ with speculation and \d+ without"):
            bench.check(8, oracle, 3)
        bench.close()
