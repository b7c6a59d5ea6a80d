"""Files of compiled kernels: whatever happened to them, what is read is what was written, or nothing."""

import os
import shutil
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymla.host import kernel_cache
from pymla.host.kernel_cache import KernelCache, take_warnings


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder that ``PYMLA_CACHE_DIR`` names, with warnings that nobody has been told."""
    monkeypatch.setenv("PYMLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache, "_known", set())
    monkeypatch.setattr(kernel_cache, "_waiting", [])
    return tmp_path / "cache"


@pytest.fixture
def cache(root):
    return KernelCache(lambda: "key")


def test_what_is_written_is_read(cache, root):
    assert cache.read("module.kernel[q4_0]") is None
    assert "module.kernel[q4_0]" not in cache
    cache.write("module.kernel[q4_0]", b"machine code")
    assert "module.kernel[q4_0]" in cache
    assert cache.read("module.kernel[q4_0]") == b"machine code"
    cache.write("module.kernel[q4_0]", b"")
    assert cache.read("module.kernel[q4_0]") == b""
    assert len(list(root.rglob("*"))) == 2  # the folder and the file
    assert take_warnings() == []


def damaged(draw, content):
    """What may become of a file's bytes: cut, with a changed bit or other bytes, or longer."""
    kind = draw(st.sampled_from(["cut", "bit", "bytes", "longer", "empty", "zeros"]))
    at = draw(st.integers(0, len(content) - 1))
    if kind == "bit":
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if kind == "bytes":
        other = draw(st.binary(min_size=1, max_size=40))
        return content[:at] + other + content[at + len(other) :]
    if kind == "longer":
        return content + draw(st.binary(min_size=1, max_size=40))
    return {"cut": content[:at], "empty": b"", "zeros": bytes(len(content))}[kind]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.binary(max_size=200))
def test_a_damaged_file_is_not_there(cache, data, written):
    cache.write("a", written)
    (path,) = cache.folder.iterdir()
    content = path.read_bytes()
    found = data.draw(st.composite(damaged)(content))
    path.write_bytes(found)
    assert cache.read("a") == (written if found == content else None)
    # It is replaced.
    cache.write("a", written)
    assert cache.read("a") == written


def test_a_file_in_the_place_of_another(cache, root):
    cache.write("a", b"code of a")
    cache.write("b", b"code of b")
    a, b = sorted(cache.folder.iterdir())
    shutil.copy(a, b)
    assert (cache.read("a"), cache.read("b")) == (b"code of a", None)
    other = KernelCache(lambda: "other sources")
    other.folder.mkdir()
    shutil.copy(a, other.folder)
    assert other.read("a") is None
    b.unlink()
    b.mkdir()
    assert cache.read("b") is None


def refused(cache, root, *parts):
    """What the cache warns of, once, where it cannot be written; it is empty then."""
    cache.write("a", b"code")
    cache.write("b", b"code")
    assert cache.read("a") is None
    (message,) = take_warnings()
    for part in (root, "compiled kernels cannot be cached in", "PYMLA_CACHE_DIR", *parts):
        assert str(part) in message
    cache.write("a", b"code")
    assert take_warnings() == []


def test_a_file_in_the_place_of_the_folder(cache, root):
    root.touch()
    refused(cache, root, "Not a directory")


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs a folder that root cannot write to")
def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    monkeypatch.setenv("PYMLA_CACHE_DIR", "/proc/cache")
    refused(cache, "/proc/cache", "No such file")


def test_a_full_disk(cache, root):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        cache.write("a", bytes(1000))
        cache.write("b", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (message,) = take_warnings()
    assert f"cannot be cached in {root / 'key'} (File too large)" in message
    assert list(cache.folder.iterdir()) == []  # nothing half written


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users are told apart on POSIX systems only")
def test_a_folder_that_others_may_write(cache, root, monkeypatch):
    """Machine code that another user put there is not run; root's is."""
    cache.write("a", b"code")
    if os.geteuid() == 0:
        os.chown(cache.folder, 54321, -1)
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
        assert cache.read("a") == b"code"
    owner = cache.folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    refused(cache, root, f"belongs to another user, number {owner}")
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert cache.read("a") == b"code"
    root.joinpath("key").chmod(0o777)
    refused(cache, root, "every user can write there")
    assert stat.S_IMODE((root / "key").stat().st_mode) == 0o777


def test_a_folder_that_is_deleted_meanwhile(cache, root):
    cache.write("a", b"code")
    shutil.rmtree(root)
    assert cache.read("a") is None
    cache.write("a", b"code")
    assert cache.read("a") == b"code"
    assert take_warnings() == []


def test_where_the_folder_is(root, cache, monkeypatch, tmp_path):
    assert cache.folder == root / "key"
    monkeypatch.delenv("PYMLA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder == tmp_path / "xdg" / "pymla" / "key"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder == tmp_path / "home" / ".cache" / "pymla" / "key"
    assert take_warnings() == []
    monkeypatch.setenv("PYMLA_CACHE_DIR", "")
    assert cache.folder == tmp_path / "home" / ".cache" / "pymla" / "key"
    (message,) = take_warnings()
    assert message.startswith("PYMLA_CACHE_DIR is empty")
    assert str(tmp_path / "home") in message


def test_no_home_folder(root, cache, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PYMLA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    cache.write("a", b"code")
    assert cache.read("a") is None
    (message,) = take_warnings()
    assert "no home folder" in message
    assert "PYMLA_CACHE_DIR" in message
