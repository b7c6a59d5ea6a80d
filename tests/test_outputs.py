"""Files that appear complete or not at all."""

import os
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pymla.errors import PymlaError
from pymla.files import outputs


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    return path


def run(script, *arguments):
    """What another process says on standard error, and its exit code."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], capture_output=True)
    return done.stderr.decode(), done.returncode


def test_a_file_appears_when_it_is_complete(old):
    old.chmod(0o640)
    with outputs.replacing(old) as part:
        part.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    assert os.listdir(old.parent) == ["a.csv"]


@pytest.mark.parametrize("error", [PymlaError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(old, error):
    def write():
        with outputs.replacing(old) as part:
            part.write_text("new")
            raise error

    with pytest.raises((PymlaError, KeyboardInterrupt)) as raised:
        write()
    if isinstance(error, OSError):
        assert str(raised.value) == f"{old}: cannot be written (No space left on device)"
    assert os.listdir(old.parent) == ["a.csv"]
    assert old.read_text() == "old"


def test_a_symbolic_link_stays_one(tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link, target = tmp_path / "link", folder / "real"
    link.symlink_to(target)
    outputs.write(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(folder) == ["real"]


def test_a_full_disk(old):
    """A limit on the size of files: the system refuses to write on, as it does when a disk is full."""
    script = """
        import resource, signal, sys
        from pathlib import Path
        from pymla.files import outputs
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        outputs.write(Path(sys.argv[1]), bytes(100_000))
    """
    error, _ = run(script, old)
    assert error.endswith(f"PymlaError: {old}: cannot be written (File too large)\n")
    assert os.listdir(old.parent) == ["a.csv"]
    assert old.read_text() == "old"


def test_devices():
    outputs.check({"--csv": Path("/dev/null")}, devices=True)
    outputs.write(Path("/dev/null"), b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(PymlaError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        outputs.write(Path("/dev/full"), b"x")
    with pytest.raises(PymlaError, match="cannot be written, it is a device"):
        outputs.check({"--csv": Path("/dev/null")})


def test_what_a_killed_process_leaves_is_replaced(old):
    script = """
        import os, signal, sys
        from pathlib import Path
        from pymla.files import outputs
        with outputs.replacing(Path(sys.argv[1])) as part:
            part.write_text("a longer text that never becomes complete")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(script, old) == ("", -9)
    assert sorted(os.listdir(old.parent)) == ["a.csv", "a.csv.part"]
    assert old.read_text() == "old"
    outputs.write(old, b"new")
    assert os.listdir(old.parent) == ["a.csv"]
    assert old.read_text() == "new"


def test_two_at_once_do_not_write_one_file(old):
    with outputs.replacing(old) as part:
        part.write_text("first")
        with pytest.raises(PymlaError, match="another process is writing it"), outputs.replacing(old):
            pass
    assert old.read_text() == "first"


def test_many_at_once(old):
    """Each writes the whole file or is refused, and nothing else is left."""

    def write(number):
        try:
            outputs.write(old, b"%d" % number * 100_000)
        except PymlaError as error:
            return str(error)
        return "written"

    with ThreadPoolExecutor(8) as pool:
        done = set(pool.map(write, [n % 10 for n in range(200)]))
    text = old.read_bytes()
    assert "written" in done
    assert all("another process is writing it" in each for each in done - {"written"})
    assert (len(text), len(set(text))) == (100_000, 1)
    assert os.listdir(old.parent) == ["a.csv"]


def test_one_file_under_two_names(old):
    link, hard = old.with_name("link"), old.with_name("hard")
    link.symlink_to(old)
    hard.hardlink_to(old)
    new = old.with_name("new")
    outputs.check({"--csv": old, "--json": new}, inputs=[old.with_name("model.gguf")])
    for other in (old, link, old.parent / "." / "a.csv"):
        with pytest.raises(PymlaError, match="--csv and --json are one file"):
            outputs.check({"--csv": old, "--json": other})
    for each in (old, link, hard):
        with pytest.raises(PymlaError, match=r"because .*a\.csv is read; choose another file for --csv"):
            outputs.check({"--csv": each}, inputs=[old])
    part = new.with_name("new.part")
    part.touch()
    with pytest.raises(PymlaError, match=r"because .*new\.part is read"):
        outputs.check({"--csv": new}, inputs=[part])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "it is a folder"),
        ("missing/a.csv", "in a folder that exists"),
        ("a.csv/b.csv", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("x" * 252, "File name too long"),
        ("a\0b", "null"),
        ("loop", "symbolic links"),
        ("taken", "taken.part is there, which is no file"),
    ],
)
def test_places_where_nothing_can_be_written(old, name, message):
    old.with_name("loop").symlink_to("loop")
    old.with_name("taken.part").mkdir()
    with pytest.raises(PymlaError, match=f"cannot be written.*{message}") as error:
        outputs.check({"--csv": old.parent / name})
    assert "\n" not in str(error.value)


def test_the_file_that_standard_output_goes_to(tmp_path):
    script = """
        import os, sys
        from pathlib import Path
        from pymla.files import outputs
        outputs.check({"--csv": Path("/dev/stdout")}, devices=True)
    """
    log = tmp_path / "log"
    with log.open("wb") as stream:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=stream, stderr=subprocess.PIPE)
    assert b"standard output goes there; choose another file for --csv" in done.stderr
    piped = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert piped.returncode == 0
