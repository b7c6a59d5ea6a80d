"""tools/pareto.py: files against the model that they were made from."""

import json
import sys
from pathlib import Path

import pareto
import pytest
import question_files
from golden_perplexity import quantised_copy

from pymla import ggml
from pymla.make.perplexity import Mean

V3 = Path(__file__).parent / "golden" / "v3.gguf"
OPTIONS = "--ctx", 64, "--chunks", 3, "--device", "cpu", "--cache-type", "f32"


@pytest.fixture
def run(monkeypatch, capfd):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["pareto.py", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            pareto.main()
        return stopped.value.code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [quantised_copy(V3, folder / f"{ggml.NAME[qtype]}.gguf", qtype) for qtype in (ggml.Q8_0, ggml.Q4_0)]


def test_a_table_a_picture_and_points(run, files, tmp_path):
    base, points, picture = (tmp_path / name for name in ("base.kld", "points.json", "plot.svg"))
    options = "--here", files[0], "--other", files[1], "--other-name", "another", "--kl-base", base
    code, out, _ = run(V3, question_files.TEXT, *OPTIONS, *options, "--json", points, "--plot", picture)
    assert code == 0
    rows = [line.split("|")[1:3] for line in out.splitlines() if line.startswith("| Q")]
    assert rows == [[" Q4_0 ", " another "], [" Q8_0 ", " pymla "]]
    found = json.loads(points.read_text())["points"]
    assert [each["name"] for each in found] == ["Q8_0", "Q4_0"]
    better, worse = found
    assert better["nbytes"] == files[0].stat().st_size > worse["nbytes"]
    assert better["bits"] > worse["bits"] > 4.5
    assert 0 < better["divergence"]["value"] < worse["divergence"]["value"] / 10
    assert worse["divergence"]["error"] > 0
    drawn = picture.read_text()
    for word in ("Q8_0", "Q4_0", "pymla", "another", "size, MiB"):
        assert word in drawn
    # The base is taken as it is.
    before = base.stat().st_mtime_ns
    code, again, _ = run(V3, question_files.TEXT, *OPTIONS, *options)
    assert (code, base.stat().st_mtime_ns) == (0, before)
    assert again == out


def test_what_cannot_be_compared(run, files, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("x" + question_files.TEXT.read_text())
    base = tmp_path / "base.kld"
    options = V3, question_files.TEXT, *OPTIONS, "--kl-base", base
    assert run(*options)[0] == 0
    code, _, err = run(V3, other, *OPTIONS, "--kl-base", base, "--here", files[0])
    assert code == 2
    assert "another text" in err
    code, _, err = run(*options, "--plot", tmp_path / "x.pdf")
    assert (code, "a plot's name ends in" in err) == (2, True)


def test_a_table_has_the_smallest_first():
    points = [
        pareto.Point(str(n), "pymla", n << 20, 4.0, Mean(0.1, 0.01), Mean(0.2, 0.02), Mean(0.9, 0.01)) for n in (3, 1)
    ]
    lines = pareto.table(points).splitlines()
    assert lines[2] == "| 1 | pymla | 1.0 | 4.00 | 0.10000 ± 0.01000 | +0.20000 ± 0.02000 | 90.00% ± 1.00% |"
    assert lines[3].startswith("| 3 |")
