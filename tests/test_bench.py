"""The sweep and its figures, and the comparison with other engines."""

import csv
import json
import os
import re
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import against
import numpy as np
import pytest
from cases import panel_codes

import pymla
import pymla.engine.loading
from pymla import ggml
from pymla.cli import main
from pymla.cpu import limits
from pymla.cpu.machine.simd_panels import sum4
from pymla.cpu.matmul.activations import Activation, counting
from pymla.cpu.matmul.unpacked import CHUNK, PAIR_ROWS, SCRATCH
from pymla.cpu.runtime.isa import AMX, LANES
from pymla.engine import costs
from pymla.errors import PymlaError
from pymla.measure import facts, plot, sweep, table

LIMITS = limits.Limits(read=1e10, int8=1e11)

#: As ik_llama.cpp prints it.
SWEEP = """\
main: n_kv_max = 1024, n_batch = 2048, n_ubatch = 512, flash_attn = 1, n_gpu_layers = -1, n_threads = 2

|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |
|-------|--------|--------|----------|----------|----------|----------|
|   512 |     16 |      0 |   17.916 |    28.58 |    1.792 |     8.93 |
|   512 |     16 |    512 |   19.419 |    26.37 |    1.614 |     9.91 |

llama_print_timings:        load time =    5376.12 ms
"""


@pytest.fixture(scope="module")
def demo():
    with pymla.load(ctx=256) as language_model:
        yield language_model


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the console script; returns exit code, standard output, standard error."""

    def call(*args, entry=main):
        monkeypatch.setattr(sys, "argv", ["pymla", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            entry()
        return stopped.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def quick(monkeypatch):
    """Fixed limits, so that tests need not measure the machine."""
    monkeypatch.setattr(limits, "measure", lambda: LIMITS)


def row(**values):
    fields = {"model": "m", "mla": "1", "dsa": False, "cache_type": "f16", "device": "cpu", "threads": 2}
    fields |= {"pp": 4, "tg": 2, "n_kv": 64}
    fields |= {"pp_seconds": (0.5,), "tg_seconds": (4.0, 1.0, 2.0)}
    fields |= {"pp_macs": 10**10, "tg_bytes": 10**9, "cache_bytes": 1 << 20}
    return sweep.Row(**{**fields, **values})


def test_limits_read_and_multiply_everything():
    data = np.arange(2 * limits._BLOCK, dtype=np.float32) % 7
    sums = np.full((2, 8), np.nan, np.float32)
    limits._read[2, 1](data, sums)
    np.testing.assert_array_equal(sums, data.reshape(2, -1, 8).sum(1))

    depth, rng = limits._DEPTH, np.random.default_rng(0)
    codes = rng.integers(0, 16, 2 * LANES * depth, dtype=np.int8)
    activations = rng.integers(-127, 128, 3 * depth, dtype=np.int8)
    out = np.full((3, 2 * LANES), np.nan, np.float32)
    limits._multiply[3, 1](codes, activations, out)
    rows = codes.reshape(2, depth // 4, LANES, 4).astype(np.int64)
    if AMX:
        products = rows * activations.reshape(3, depth // 4, 1, 4)[:2] * limits.TILE_TIMES
        np.testing.assert_allclose(out, np.broadcast_to(products.sum((1, 3)).reshape(-1), out.shape), rtol=1e-6)
        return
    # [column, panel, group of 4, lane, code]: 64 times round, groups of even and of odd number apart.
    products = rows * activations.reshape(3, 1, depth // 4, 1, 4) * limits._TIMES
    by_parity = products.reshape(3, 2, depth // 8, 2, LANES, 4).sum(2)
    if sum4.element == "i16":
        by_parity = by_parity.reshape(*by_parity.shape[:-1], 2, 2).sum(-1).astype(np.int16).astype(np.int64)
    expected = by_parity.sum((0, 2, 4)).reshape(-1)
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-6, atol=0.5)


def test_packed_products_are_those_of_the_panels():
    rng = np.random.default_rng(0)
    # Five columns: the last tile is not full. K is not a multiple of the panels' length.
    x = Activation(rng.standard_normal((5, CHUNK + 128), dtype=np.float32)).panels(ggml.Q4_0)
    scratch = np.zeros(SCRATCH, np.uint8)
    codes = scratch[: PAIR_ROWS * CHUNK].view(np.int8).reshape(2, CHUNK // 4, LANES, 4)
    zero_point = 0 if AMX else 8
    codes[:] = rng.integers(-8, 8, codes.shape) + zero_point
    scales = scratch[PAIR_ROWS * CHUNK :][: PAIR_ROWS * CHUNK // 4].view(np.float32).reshape(2, -1, LANES)
    scales[:] = rng.random(scales.shape)
    out = np.full((2, PAIR_ROWS), np.nan, np.float32)
    limits._multiply_packed[2, 1](scratch, x, counting(5), out)
    rows = codes.transpose(0, 2, 1, 3).reshape(PAIR_ROWS, CHUNK).astype(np.float64) - zero_point
    # The scales of both panels, one for each row and 32 columns.
    rows *= np.repeat(scales[:, : CHUNK // 32].transpose(0, 2, 1).reshape(PAIR_ROWS, -1), 32, axis=1)
    column = panel_codes(x)[-1] * np.repeat(x.scale[-1].astype(np.float64), 32)
    expected = rows @ column[:CHUNK] + rows[:, :128] @ column[CHUNK:]
    np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), rtol=1e-5, atol=1e-3)


def test_limits_are_rates():
    found = limits.measure()
    assert 1e8 < found.read < 1e13
    assert 1e8 < found.int8 < 1e14
    assert 1e7 < limits.packed_rate() < found.int8 * 1.5


def test_settings_refuse_nonsense():
    for settings in ({"pp": 0, "tg": 0}, {"pp": -1}, {"depths": (64, 0)}, {"depths": ()}, {"depths": (0, 0)}):
        with pytest.raises(PymlaError, match=r"`pp`|`depths`"):
            sweep.Settings(**settings)
    with pytest.raises(PymlaError, match="`repeat` is 0"):
        sweep.Settings(repeat=0)
    assert sweep.sweep_depths(1024, 256, 128) == (0, 256, 512, 768)
    assert sweep.sweep_depths(1023, 256, 128) == (0, 256, 512)
    assert sweep.sweep_depths(1024, 256, 512) == (0, 256, 512)
    assert sweep.sweep_depths(1024, 0, 512) == (0, 512)


def test_sweep_measures_at_each_depth(demo, monkeypatch):
    """Generation first, which is forgotten; then the prompt, which stays and counts for the next depth."""
    calls, step = [], demo.model.step

    def recorded(batch, **options):
        calls.append((batch[0][0].length, len(batch[0][1])))
        return step(batch, **options)

    monkeypatch.setattr(demo.model, "step", recorded)
    progress = []
    settings, free = sweep.Settings(pp=8, tg=2, depths=(0, 8, 70), repeat=2), demo.model.cache.free_pages
    rows = list(sweep.sweep(demo, settings, lambda *each: progress.append(each)))
    generation = [[(n, 1), (n + 1, 1)] * 2 for n in (0, 8, 70)]
    prompts = [[(n, 8)] * 2 for n in (0, 8, 70)]
    expected = [*generation[0], *prompts[0], *generation[1], *prompts[1], (16, 54), *generation[2], *prompts[2]]
    assert calls[-len(expected) :] == expected
    assert [each.n_kv for each in rows] == [0, 8, 70]
    assert all(len(each.pp_seconds) == len(each.tg_seconds) == 2 for each in rows)
    assert progress[-1][0] == progress[-1][1]
    assert sorted(progress) == progress
    assert demo.model.cache.free_pages == free


def test_row_counts_what_the_step_costs(demo):
    (found,) = sweep.sweep(demo, sweep.Settings(pp=8, tg=3, depths=(64,)))
    config, tensors = demo.config, demo.file.tensors
    assert found.pp_macs == sum(op.macs for op in costs.step_ops(config, None, 8, 72))
    each = [costs.token_bytes(config, tensors, 64 + n) for n in (1, 2, 3)]
    assert found.tg_bytes == pytest.approx(sum(each), rel=1e-4)
    assert found.cache_bytes == 64 * demo.model.cache.row_bytes


def test_sweep_refuses_a_short_context(demo):
    with pytest.raises(PymlaError, match="needs a context of 300 tokens and has 256"):
        next(sweep.sweep(demo, sweep.Settings(pp=100, tg=1, depths=(200,))))


def test_shares_come_from_medians():
    one = row()
    assert (one.s_pp, one.t_tg, one.s_tg) == (8, 2, 1)
    assert one.shares(LIMITS) == (0.2, 0.05)
    # In a table the shares are per cent.
    assert table.line(one, LIMITS).split("|")[8:10] == ["    20.0% ", "     5.0% "]
    long_prompt = row(tg=0, tg_seconds=(), tg_bytes=0)
    assert table.cells(long_prompt, LIMITS)[5:7] == (None, None)
    assert table.line(long_prompt, LIMITS).split("|")[6].strip() == "-"


def test_no_shares_on_several_devices():
    assert row(device="cpu+cuda").shares(LIMITS) == (None, None)
    assert table.line(row(device="cpu+cuda"), LIMITS).split("|")[8:10] == ["        - ", "        - "]


def test_a_gpu_in_the_facts(monkeypatch):
    monkeypatch.setattr("pymla.cuda.describe", lambda: {"name": "NVIDIA H100", "capability": (9, 0)})
    about = facts.gather(LIMITS, "cuda")
    assert (about["device"], about["gpu"], about["gpu_isa"]) == ("cuda", "NVIDIA H100", "sm_90")
    assert facts.describe(about).startswith("NVIDIA H100, sm_90, ")
    assert "threads" not in facts.describe(about)


def test_table_has_the_peers_columns():
    lines = table.header().splitlines()
    theirs = SWEEP.splitlines()[2:4]
    assert [ours.startswith(each[:-1]) for ours, each in zip(lines, theirs, strict=True)] == [True, True]
    assert {len(each) for each in (*lines, table.line(row(), LIMITS))} == {len(lines[0])}
    # What reads a peer's table reads ours.
    (parsed,) = against.parse_sweep(table.line(row(), LIMITS))
    assert parsed == {"pp": 4, "tg": 2, "n_kv": 64, "t_pp": 0.5, "t_tg": 2.0}


def test_command(run, tmp_path, quick):
    files = [tmp_path / name for name in ("a.csv", "a.json")]
    options = ("--pp", 32, "--tg", 2, "--depths", "0,64", "--mla", "auto,1", "--repeat", 2, "--threads", 1)
    code, out, _ = run("bench", *options, "--csv", files[0], "--json", files[1])
    assert code == 0
    assert "reads 10.0 GB/s, int8 100 GMAC/s" in out
    assert re.findall(r"^demo.gguf, mla (\w+), q8_0 cache$", out, re.MULTILINE) == ["auto", "1"]
    printed = against.parse_sweep(out)
    assert [(each["pp"], each["tg"], each["n_kv"]) for each in printed] == 2 * [(32, 2, 0), (32, 2, 64)]
    report = json.loads(files[1].read_text())
    assert report["limits"] == {"read_bytes_per_second": 1e10, "int8_macs_per_second": 1e11}
    assert (report["device"], report["threads"]) == ("cpu", 1)
    assert {each["device"] for each in report["rows"]} == {"cpu"}
    assert [each["mla"] for each in report["rows"]] == ["auto", "auto", "1", "1"]
    with files[0].open(newline="") as stream:
        table = list(csv.DictReader(stream))
    for line, record, shown in zip(table, report["rows"], printed, strict=True):
        assert len(record["pp_seconds"]) == 2
        assert float(line["T_PP s"]) == record["t_pp"] == pytest.approx(np.median(record["pp_seconds"]))
        assert record["t_pp"] == pytest.approx(shown["t_pp"], abs=6e-4)
        assert float(line["TG share"]) == record["tg_share"]
        assert record["s_tg"] == pytest.approx(2 / record["t_tg"])


def test_command_sweeps_by_default(run, quick):
    code, out, _ = run("bench", "--pp", 64, "--tg", 1, "--ctx", 200)
    assert code == 0
    assert [each["n_kv"] for each in against.parse_sweep(out)] == [0, 64, 128]


def test_command_measures_one_prompt(run, quick):
    code, out, _ = run("bench", "--prompt", 700)
    assert code == 0
    assert re.search(
        r"^\| +700 \| +0 \| +0 \| +[0-9.]+ \| +[0-9.]+ \| +- \| +- \| +[0-9.]+% \| +- \|", out, re.MULTILINE
    )


def test_interrupt_keeps_the_rows_so_far(run, quick, monkeypatch, tmp_path):
    def interrupted(*_):
        yield row()
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    code, out, _ = run("bench", "--json", tmp_path / "a.json")
    assert code == 130
    assert len(against.parse_sweep(out)) == 1
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 1


def failing(*_):
    """A sweep whose second point fails."""
    yield row()
    raise PymlaError("no memory is left")


def test_an_error_keeps_the_rows_so_far(run, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "sweep", failing)
    code, _, err = run("bench", "--json", tmp_path / "a.json")
    assert (code, err.splitlines()[-1]) == (2, "pymla: error: no memory is left")
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 1


def test_an_interrupt_without_rows_keeps_the_older_files(run, quick, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "sweep", interrupted)
    (tmp_path / "a.csv").write_text("older")
    assert run("bench", "--csv", tmp_path / "a.csv")[0] == 130
    assert (tmp_path / "a.csv").read_text() == "older"


def test_a_file_that_cannot_be_written_does_not_cost_the_others(run, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "sweep", lambda *_: iter([row()]))
    code, _, err = run("bench", "--csv", "/dev/full", "--json", tmp_path / "a.json")
    assert code == 2
    assert "/dev/full: cannot be written (No space left on device)" in err
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 1


def test_outputs_go_to_devices_and_through_links(run, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "sweep", lambda *_: iter([row(model="m\udcff")]))
    (tmp_path / "link.csv").symlink_to("real.csv")
    assert run("bench", "--csv", tmp_path / "link.csv", "--json", "/dev/null")[0] == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().count("\n") == 2
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["link.csv", "real.csv"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--csv", "x", "--json", "x"], ["x: --csv and --json are one file"]),
        (["--csv", "x.svg", "--plot", "./x.svg"], ["--csv and --plot are one file"]),
        (["--json", "y.svg", "--plot", "x.svg"], ["--json and --plot are one file"]),
        (["-m", "m.gguf", "--csv", "m.gguf"], ["m.gguf: cannot be written, because m.gguf is read"]),
        (["-m", "m.gguf", "--json", "hard.gguf"], ["hard.gguf: cannot be written, because m.gguf is read"]),
        (["--csv", "."], [".: cannot be written, it is a folder"]),
        (["--csv", ""], ["cannot be written, it is a folder"]),
    ],
)
def test_outputs_that_are_needed_elsewhere(run, options, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "m.gguf"
    model.write_bytes(pymla.engine.loading.demo_path().read_bytes())
    (tmp_path / "hard.gguf").hardlink_to(model)
    (tmp_path / "y.svg").symlink_to("x.svg")
    test_bad_options(run, options, parts, monkeypatch, tmp_path)
    assert model.read_bytes() == pymla.engine.loading.demo_path().read_bytes()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--depths", "0,x"], ["--depths '0,x'"]),
        (["--depths", "64,0"], ["--depths is 64,0;", "ascending"]),
        (["--depths", "0,900"], ["1412 tokens of context", "1024"]),
        (["--depths", "0,100", "--ctx", "300"], ["612 tokens", "300", "--ctx"]),
        (["--ctx", "100"], ["--ctx 100", "--pp 512"]),
        (["--mla", "1,9"], ["'9'", "auto, 0, 1, 2, 3"]),
        (["--pp", "0", "--tg", "0"], ["--pp is 0 and --tg 0"]),
        (["--repeat", "0"], ["--repeat is 0"]),
        (["--prompt", "8", "--tg", "1"], ["--prompt", "--tg"]),
        (["--threads", "10000"], ["--threads is 10000"]),
        (["--plot", "a.pdf"], ["a.pdf", ".png or .svg"]),
        (["--csv", "missing/folder/a.csv"], ["a.csv", "cannot be written"]),
        (["-m", "missing.gguf"], ["missing.gguf"]),
    ],
)
def test_bad_options(run, options, parts, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("bench", *options)
    assert (code, out) == (2, "")
    assert err.startswith("pymla: error: ")
    assert err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_plot(run, quick, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "a.svg"
    code, _, _ = run("bench", "--pp", 16, "--tg", 1, "--depths", "0,32", "--mla", "1,3", "--plot", picture)
    assert code == 0
    text = picture.read_text()
    for part in (
        "mla 1",
        "mla 3",
        "N_KV",
        "tokens per second",
        "demo.gguf",
        "PP 16, TG 1, q8_0 cache",
        facts.machine(),
    ):
        assert part in text
    lines = [plot.Series("a", [0, 64], [2.0, 1.0], [None, None], [(1, 3), (1, 1)])]
    plot.sweep(lines, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("bench", "--plot", "a.png")
    assert code == 2
    assert 'pip install "pymla[bench]"' in err


def test_parse_sweep():
    rows = against.parse_sweep(SWEEP)
    assert rows[1] == {"pp": 512, "tg": 16, "n_kv": 512, "t_pp": 19.419, "t_tg": 1.614}
    assert len(rows) == 2
    with pytest.raises(PymlaError, match="no table: out of memory"):
        against.parse_sweep("loading\nout of memory\n")


def test_parse_llama_bench():
    rows = [
        {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 40.5},
        {"n_prompt": 0, "n_gen": 16, "n_depth": 0, "avg_ts": 9.5},
        {"n_prompt": 512, "n_gen": 0, "n_depth": 4096, "avg_ts": 20.5},
    ]
    found = against.parse_llama_bench("warning: something\n" + json.dumps(rows))
    assert found == {0: (40.5, 9.5), 4096: (20.5, None)}


def engines(*labels):
    return [SimpleNamespace(label=label) for label in labels]


def test_ratios_are_taken_within_a_round():
    def each(*rates):
        return dict(zip(("pymla", "a", "b"), ({0: against.Rates(rate, None)} for rate in rates), strict=True))

    rounds = [each(8, 4, 2), each(3, 1, 3), each(6, 1, 3)]
    assert against.compare(rounds, "pymla", "a", 0, "pp") == (3, 2, 6)
    assert against.compare(rounds, "pymla", "best", 0, "pp") == (2, 1, 2)
    assert against.compare(rounds, "pymla", "a", 0, "tg") is None
    job = SimpleNamespace(model=Path("folder/m.gguf"), points=(0,), prompt=None, pp=512, tg=1)
    table = list(against.table([(job, rounds)], engines("pymla", "a", "b")))
    assert table[2] == "| m | 0 | PP512 | 6.00 | a | 1.00 | 3.00x | 2.00x | 6.00x |"
    assert table[-1] == "| m | 0 | PP512 | 6.00 | best | 3.00 | 2.00x | 1.00x | 2.00x |"
    (first, *_) = against.series(rounds, engines("pymla", "a"), job)
    assert first == plot.Series("pymla", [0], [6], [None], [(3, 8)], first.tg_range)


@pytest.fixture
def peer(tmp_path):
    """A program that answers like llama-sweep-bench, and notes how it was called."""
    if os.name != "posix":
        pytest.skip("a script as a program")
    path = tmp_path / "peer"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"if '--fail' in sys.argv: sys.exit('no such model')\n"
        f"print({SWEEP!r}, file=sys.stderr)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_against(run, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(against.Pymla, "measure", lambda self, job: {0: against.Rates(57.16, 17.86)})
    model = pymla.engine.loading.demo_path()
    options = ("-m", model, "--llama-sweep-bench", f"{peer} -rtr", "--rounds", 2, "--threads", 1, "--tg", 16)
    code, out, err = run(*options, "--json", tmp_path / "a.json", entry=against.main)
    assert code == 0, err
    assert "| demo | 0 | PP512 | 57.16 | llama-sweep-bench -rtr | 28.58 | 2.00x | 2.00x | 2.00x |" in out
    assert "| demo | 0 | TG16 | 17.86 | llama-sweep-bench -rtr | 8.93 | 2.00x | 2.00x | 2.00x |" in out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert calls[0].endswith("-t 1 -ctk q8_0 -mla 3 -fa on -c 512 -ub 512 -n 16 -rtr")
    report = json.loads((tmp_path / "a.json").read_text())
    (of_model,) = report["models"]
    assert of_model["model"] == "demo.gguf"
    assert of_model["rounds"][1]["pymla"]["0"] == {"pp": 57.16, "tg": 17.86}


def test_against_compares_on_several_models(run, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(against.Pymla, "measure", lambda self, job: {0: against.Rates(57.16, 17.86)})
    demo, other = pymla.engine.loading.demo_path(), tmp_path / "other.gguf"
    other.write_bytes(demo.read_bytes())
    options = ("-m", demo, "-m", other, "--llama-sweep-bench", peer, "--tg", 16, "--rounds", 2)
    code, out, err = run(*options, "--json", tmp_path / "a.json", entry=against.main)
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines() if "PP512" in line] == ["demo", "other"]
    models = json.loads((tmp_path / "a.json").read_text())["models"]
    assert [(each["model"], len(each["rounds"])) for each in models] == [("demo.gguf", 2), ("other.gguf", 2)]
    code, _, err = run(*options, "--plot", tmp_path / "a.svg", entry=against.main)
    assert code == 2
    assert "--plot draws one model" in err
    code, _, err = run(*options, "-m", demo, entry=against.main)
    assert code == 2
    assert "two models have the same name" in err


def test_against_measures_one_prompt(run, peer, tmp_path, monkeypatch):
    monkeypatch.setattr(against.Pymla, "measure", lambda self, job: {0: against.Rates(100.0, None)})
    options = ("-m", pymla.engine.loading.demo_path(), "--llama-sweep-bench", peer, "--prompt")
    code, out, _ = run(*options, 1024, entry=against.main)
    assert code == 0
    assert f"| prompt of 1024 | 100.00 | llama-sweep-bench | {1024 / (17.916 + 19.419):.2f} |" in out
    code, _, err = run(*options, 2048, entry=against.main)
    assert code == 2
    assert "a prompt of 1024 tokens, not 2048" in err


def test_against_runs_pymla(quick):
    job = against.Job(pymla.engine.loading.demo_path(), pp=16, tg=1, depths=(0, 32), threads=1, cache_type="f16")
    found = against.Pymla().measure(job)
    assert list(found) == [0, 32]
    assert all(rates.pp > 0 and rates.tg > 0 for rates in found.values())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "give at least one peer"),
        (["--llama-sweep-bench", "/nowhere/peer"], "/nowhere/peer: No such file"),
        (["--llama-sweep-bench", "PEER --fail"], "ended with code 1: no such model"),
        (["--llama-sweep-bench", "PEER", "--depths", "0,1024"], "measured nothing at a depth of 1024"),
        (["--llama-sweep-bench", "PEER", "--depths", "0,100"], "multiples of --pp 512"),
        (["--llama-sweep-bench", "PEER", "--tg", "600"], "--tg 600"),
        (["--llama-sweep-bench", "PEER", "--llama-sweep-bench", "PEER"], "same name"),
        (["--llama-sweep-bench", "PEER", "--depths", "x"], "--depths 'x'"),
    ],
)
def test_against_refuses(run, peer, monkeypatch, options, part):
    rates = against.Rates(1.0, 1.0)
    monkeypatch.setattr(against.Pymla, "measure", lambda self, job: dict.fromkeys(job.points, rates))
    options = [option.replace("PEER", str(peer)) for option in options]
    code, _, err = run("-m", pymla.engine.loading.demo_path(), *options, entry=against.main)
    assert code == 2
    assert part in err.splitlines()[-1]
