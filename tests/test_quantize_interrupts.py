"""``pymla quantize`` that is interrupted, killed, or finds the disk full: the next run writes the same bytes."""

import random
import resource
import signal
import textwrap
import time

import pytest
from make_model import make_model
from test_cli import run  # noqa: F401 - a fixture
from test_interrupts import started
from test_make_model import TINY

from pymla.cli import interrupt
from pymla.files import gguf_output
from pymla.make.split import split

#: The program, which records every tensor, and says so before each piece that it writes.
SLOW = """
    import time
    from pymla import cli
    from pymla.files import gguf_output
    gguf_output.RECORD_BYTES = 1
    write_all = gguf_output.write_all
    def slow(write, data):
        time.sleep(0.005)
        print("ready", flush=True)
        write_all(write, data)
    gguf_output.write_all = slow
    cli.main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("source") / "bf16.gguf", TINY, qtype="bf16", layout="split", seed=1)


@pytest.fixture(scope="module")
def parts(source):
    return split(source, source.with_name("part"), max_tensors=20)


def quantized(folder, source, *options):
    """The arguments of a run in a folder, where it finds older files."""
    folder.mkdir()
    (folder / "out.gguf").write_bytes(b"an older file")
    return "quantize", source, folder / "out.gguf", "Q8_0", *options


def finished(run, folder, arguments):  # noqa: F811
    """Let the same command run to its end. Returns what it prints, and all files but the older one."""
    code, _, err = run(*arguments)
    assert code == 0, err
    assert not [path for path in folder.iterdir() if ".part" in path.suffixes]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return err, {name: data for name, data in found.items() if data != b"an older file"}


@pytest.fixture
def whole(run, source, tmp_path):  # noqa: F811
    """The bytes of a run that nobody interrupted."""
    folder = tmp_path / "whole"
    return finished(run, folder, quantized(folder, source))[1]


def test_ctrl_c(run, source, whole, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    arguments = quantized(folder, source)
    process = started("-c", textwrap.dedent(SLOW), *map(str, arguments))
    for _ in range(30):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == interrupt.CODE, err
    path = folder / "out.gguf"
    last = err.strip().splitlines()[-1]
    assert last == f"pymla: {path}: interrupted; the same command goes on where it stopped"
    assert "Traceback" not in err
    assert path.read_bytes() == b"an older file"
    err, found = finished(run, folder, arguments)
    assert "are there from an interrupted run, which goes on" in err
    assert found == whole


@pytest.mark.parametrize(("keep_split", "kills"), [(False, 2), (True, 1)])
def test_kills_at_any_moment(run, source, parts, whole, tmp_path, keep_split, kills):  # noqa: F811
    """Nothing has a final name before the whole is there."""
    folder, rng = tmp_path / "out", random.Random(keep_split)
    arguments = quantized(folder, parts[1], "--keep-split") if keep_split else quantized(folder, source)
    for _ in range(kills):
        process = started("-c", textwrap.dedent(SLOW), *map(str, arguments))
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 0.25))
        process.kill()
        process.communicate()
        assert [path.name for path in folder.glob("*.gguf")] == ["out.gguf"]
        assert (folder / "out.gguf").read_bytes() == b"an older file"
    assert list(folder.glob("*.journal"))
    _, found = finished(run, folder, arguments)
    if not keep_split:
        assert found == whole
        return
    undisturbed = tmp_path / "undisturbed"
    assert found == finished(run, undisturbed, quantized(undisturbed, parts[0], "--keep-split"))[1]
    assert sorted(found) == [f"out-{number + 1:05}-of-{len(parts):05}.gguf" for number in range(len(parts))]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_disk_that_becomes_full(run, source, whole, tmp_path, monkeypatch, recorded):  # noqa: F811
    """A limit on the size of files: the system refuses to write on, as it does when a disk is full. What was recorded
    stays, and counts for the next run."""
    if recorded:
        monkeypatch.setattr(gguf_output, "RECORD_BYTES", 1)
    folder = tmp_path / "out"
    arguments = quantized(folder, source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["out.gguf"]) - 5000, limits[1]))
    try:
        code, _, err = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    (error,) = [line for line in err.splitlines() if line.startswith("pymla: error: ")]
    assert error.endswith("out.gguf: cannot be written (File too large)")
    assert (folder / "out.gguf").read_bytes() == b"an older file"
    names = {path.name for path in folder.iterdir()}
    assert names == {"out.gguf", *(["out.gguf.part", "out.gguf.part.journal"] if recorded else [])}
    err, found = finished(run, folder, arguments)
    assert ("which goes on" in err) is recorded
    assert found == whole
