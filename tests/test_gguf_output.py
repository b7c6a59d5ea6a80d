"""GGUF files that are written whole or not at all, and go on where an interrupted run stopped."""

import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from written_models import METADATA, Model

from pymla import ggml
from pymla.errors import PymlaError
from pymla.files import gguf_output, gguf_writer
from pymla.files.gguf_output import Refused, Resume, write_files
from pymla.files.gguf_reader import ModelFile
from pymla.files.journal import Journal
from pymla.host.read_ahead import read_ahead


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"x")
    return path


@pytest.fixture
def small_records(monkeypatch):
    """Every tensor is recorded, if no record is being made."""
    monkeypatch.setattr(gguf_output, "RECORD_BYTES", 1)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "input"}


def expected(tmp_path, parts=1):
    """The files of a run without interruptions."""
    folder = tmp_path / "whole"
    folder.mkdir()
    write_files(Model().files(folder / "m.gguf", parts))
    found = contents(folder)
    shutil.rmtree(folder)
    return found


def stop_after(calls, error=KeyboardInterrupt):
    """Progress that raises at a call."""
    seen = []

    def progress(done, total, name):
        seen.append(name)
        if len(seen) > calls:
            raise error

    return progress


def test_the_same_bytes_as_the_plain_writer(tmp_path):
    model = Model(ggml.F16)
    write_files(model.files(tmp_path / "m.gguf"))
    gguf_writer.write(tmp_path / "plain.gguf", "test", {"words": ["a", "b"]}, model.tensors)
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert ModelFile.open(tmp_path / "m.gguf").tensors["t3"].data.tobytes() == model.values[3].astype("f2").tobytes()


def test_progress(tmp_path):
    calls = []
    write_files(Model().files(tmp_path / "m.gguf", 2), progress=lambda *call: calls.append(call))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [name for *_, name in calls] == ["t0"] + [f"t{i}" for i in range(10) for _ in range(3)]
    assert {each for _, each, _ in calls} == {total}
    done = [each for each, *_ in calls]
    assert done == sorted(done)
    assert done[-1] == total
    assert done[0] == total - 10 * 96  # headers


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("calls", [0, 4, 17, 30])
def test_an_interrupted_run_goes_on(tmp_path, source, small_records, calls, parts):
    folder = tmp_path / "out"
    folder.mkdir()
    old = folder / ("m.gguf" if parts == 1 else "m-00001-of-00003.gguf")
    old.write_bytes(b"an older file")
    notes, model = [], Model()
    with pytest.raises(KeyboardInterrupt):
        write_files(model.files(folder / "m.gguf", parts), Resume([source], notes.append), stop_after(calls))
    assert old.read_bytes() == b"an older file"
    assert {name.removesuffix(".journal").removesuffix(".part") for name in contents(folder)} <= set(
        expected(tmp_path, parts)
    )
    recorded = bool(list(folder.glob("*.journal")))
    assert recorded == (calls >= 4)
    assert len(notes) == recorded
    later, notes = Model(), []
    write_files(later.files(folder / "m.gguf", parts), Resume([source], notes.append))
    assert contents(folder) == expected(tmp_path, parts)
    if recorded:
        assert "are there from an interrupted run, which goes on" in notes[0]
        assert 0 not in later.made
    assert sorted({*model.made, *later.made}) == list(range(10))


def test_without_inputs_nothing_stays(tmp_path, small_records):
    with pytest.raises(KeyboardInterrupt):
        write_files(Model().files(tmp_path / "m.gguf"), progress=stop_after(20))
    assert contents(tmp_path) == {}


def test_little_does_not_stay(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        write_files(Model().files(tmp_path / "m.gguf"), Resume([source]), stop_after(20))
    assert contents(tmp_path) == {}


def interrupted(path, source, files=None):
    with pytest.raises(KeyboardInterrupt):
        write_files(files or Model().files(path), Resume([source]), stop_after(20))
    assert path.with_name("m.gguf.part.journal").exists()


@pytest.mark.parametrize("change", ["time", "size", "metadata", "type", "version", "journal"])
def test_a_run_that_would_write_other_bytes_begins_anew(tmp_path, source, small_records, monkeypatch, change):
    path, notes, model = tmp_path / "m.gguf", [], Model()
    files = Model(ggml.F16).files(path) if change == "type" else None
    if change == "metadata":
        files = [Model().files(path)[0]._replace(metadata=METADATA | {"more": 1})]
    interrupted(path, source, files)
    if change == "time":
        os.utime(source, (1, 1))
    elif change == "size":
        found = source.stat()
        source.write_bytes(b"xy")
        os.utime(source, ns=(found.st_atime_ns, found.st_mtime_ns))
    elif change == "version":
        monkeypatch.setattr(gguf_output, "_program", lambda: b"another")
    elif change == "journal":
        path.with_name("m.gguf.part.journal").write_bytes(b"\xff\0 nonsense\n7\n")
    write_files(model.files(path), Resume([source], notes.append))
    assert notes == [f"{path}.part: of an interrupted run with other inputs, options or version; it begins anew"]
    assert set(model.made) == set(range(10))
    assert contents(tmp_path) == expected(tmp_path)


def test_a_partial_file_that_was_cut(tmp_path, source, small_records):
    path, notes, model = tmp_path / "m.gguf", [], Model()
    interrupted(path, source)
    os.truncate(f"{path}.part", 500)
    write_files(model.files(path), Resume([source], notes.append))
    assert "has become shorter since it was interrupted" in notes[0]
    assert contents(tmp_path) == expected(tmp_path)


def test_what_is_refused_does_not_stay(tmp_path, source, small_records):
    with pytest.raises(Refused):
        write_files(Model().files(tmp_path / "m.gguf"), Resume([source]), stop_after(20, Refused("no")))
    assert contents(tmp_path) == {}

    def check(paths):
        assert ModelFile.open(paths[0]).tensors
        raise PymlaError("not this one")

    with pytest.raises(PymlaError, match="not this one"):
        write_files(Model().files(tmp_path / "m.gguf"), Resume([source], check=check))
    assert contents(tmp_path) == {}


def test_errors_of_reading_can_be_mended(tmp_path, source, small_records):
    """A disk of the network that does not answer, for example."""
    path, model = tmp_path / "m.gguf", Model()

    def fail(rows):
        raise PymlaError("input: cannot be read")

    model.tensors[7] = model.tensors[7]._replace(encode=fail)
    with pytest.raises(PymlaError, match="cannot be read"):
        write_files(model.files(path), Resume([source]))
    later = Model()
    write_files(later.files(path), Resume([source]))
    assert 0 not in later.made
    assert contents(tmp_path) == expected(tmp_path)


def test_a_disk_that_becomes_full(tmp_path, source, small_records):
    """A limit on the size of files: the system refuses to write on, as it does when a disk is full."""
    path, later = tmp_path / "m.gguf", Model()
    whole = expected(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["m.gguf"]) - 150, limits[1]))
    try:
        with pytest.raises(PymlaError, match=r"m\.gguf: cannot be written \(File too large\)"):
            write_files(Model().files(path), Resume([source]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()
    write_files(later.files(path), Resume([source]))
    assert 0 not in later.made
    assert contents(tmp_path) == whole


def test_a_full_disk_is_found_out_before_writing(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=900))
    model = Model()
    with pytest.raises(PymlaError, match=r"disk has 0\.0 GiB free"):
        write_files(model.files(tmp_path / "m.gguf"), Resume([source]))
    assert (contents(tmp_path), model.made) == ({}, [])


def test_only_one_process_writes(tmp_path, source, small_records):
    path = tmp_path / "m.gguf"

    def again(done, total, name):
        with pytest.raises(PymlaError, match="another process is writing it"):
            write_files(Model().files(path), Resume([source]))

    write_files(Model().files(path), Resume([source]), again)
    assert contents(tmp_path) == expected(tmp_path)


def test_inputs_are_not_written_over(tmp_path):
    path = tmp_path / "m-00002-of-00003.gguf"
    path.write_bytes(b"x")
    with pytest.raises(PymlaError, match=r"00002-of-00003\.gguf is read; choose another file for part 2"):
        write_files(Model().files(tmp_path / "m.gguf", 3), Resume([path]))
    with pytest.raises(PymlaError, match="No such file"):
        write_files(Model().files(tmp_path / "m.gguf"), Resume([tmp_path / "missing"]))
    assert contents(tmp_path) == {path.name: b"x"}


@pytest.mark.parametrize("rows", [2, 4])
def test_pieces_that_are_not_the_tensors_bytes(tmp_path, rows):
    model = Model()
    model.tensors[4] = model.tensors[4]._replace(pieces=lambda: list(np.ones((rows, 8), np.float32)))
    with pytest.raises(ValueError, match="t4: its pieces are not its bytes"):
        write_files(model.files(tmp_path / "m.gguf"))
    model.tensors[9] = model.tensors[9]._replace(pieces=list)
    model.tensors[4] = Model().tensors[4]
    with pytest.raises(ValueError, match="t9: its pieces are fewer than its bytes"):
        write_files(model.files(tmp_path / "m.gguf"))
    assert contents(tmp_path) == {}


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from pymla.files import gguf_output
    from written_models import Model
    gguf_output.RECORD_BYTES = 1
    folder, parts = Path(sys.argv[2]), int(sys.argv[3])
    print("ready", flush=True)
    files = Model().files(folder / "m.gguf", parts)
    gguf_output.write_files(files, gguf_output.Resume([folder / "input"]), lambda *step: time.sleep(0.004))
"""


@pytest.mark.parametrize(("parts", "kills"), [(1, 1), (3, 3)])
def test_runs_that_are_killed_at_any_moment(tmp_path, source, parts, kills):
    """The last of them gives the bytes of a run that nobody killed, and none puts anything under a final name."""
    whole, rng = expected(tmp_path, parts), random.Random(parts)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(Path(__file__).parent), str(tmp_path), str(parts)]
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        found = {name: data for name, data in contents(tmp_path).items() if name.endswith(".gguf")}
        assert found in ({}, whole)
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path) == whole


def test_a_set_is_never_mixed(tmp_path, monkeypatch):
    """While the parts take their names, the set lacks its first part."""
    first = tmp_path / "m-00001-of-00003.gguf"
    for path in expected(tmp_path, 3):
        (tmp_path / path).write_bytes(b"old")
    seen, replace = [], Path.replace

    def watched(part, target):
        seen.append((target.name, first.exists()))
        return replace(part, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_files(Model().files(tmp_path / "m.gguf", 3))
    assert seen == [(f"m-0000{number}-of-00003.gguf", False) for number in (3, 2, 1)]
    assert contents(tmp_path) == expected(tmp_path, 3)


def test_journals(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path, "key")
    assert (journal.read(), journal.exists) == (0, False)
    journal.record(3)
    journal.record(12)
    assert Journal(path, "key").read() == 12
    assert Journal(path, "another").read() is None
    with path.open("a") as file:
        file.write("99")  # cut off
    assert Journal(path, "key").read() == 12
    path.write_text("key\n-1\nx\n")
    assert Journal(path, "key").read() == 0
    journal.remove()
    journal.remove()
    assert not path.exists()


def test_reading_ahead():
    threads = set()

    def items():
        for i in range(9):
            threads.add(threading.current_thread())
            yield i
            if i == 7:
                raise PymlaError("no ninth item")

    found = read_ahead(items())
    assert [next(found) for _ in range(8)] == list(range(8))
    with pytest.raises(PymlaError, match="no ninth item"):
        next(found)
    assert threading.current_thread() not in threads
    with closing(read_ahead(iter(range(100)))) as some:
        assert [next(some), next(some)] == [0, 1]
    assert not [thread for thread in threading.enumerate() if "pymla-read-ahead" in thread.name]


def test_reading_ahead_without_a_thread(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert list(read_ahead(iter(range(5)))) == [0, 1, 2, 3, 4]
