"""Text files with byte order marks and without."""

import hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla.errors import PymlaError
from pymla.files.checkpoint import read_json
from pymla.files.textfile import decode
from pymla.make.convert import convert


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_byte_order_marks_are_no_part_of_a_text(text):
    text = text.lstrip("\ufeff")
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode(text.encode(encoding), "file") == text
    assert decode(b"\xfe\xff" + text.encode("utf-16-be"), "file") == text
    assert decode(b"\x00\x00\xfe\xff" + text.encode("utf-32-be"), "file") == text


def test_bytes_that_are_no_text():
    with pytest.raises(PymlaError, match=r"prompt.txt: byte 3 is not valid UTF-8 .*; save it as UTF-8"):
        decode(b"caf\xe9", "prompt.txt")
    with pytest.raises(PymlaError, match=r"prompt.txt: byte \d is not valid UTF-16 .*; save it as UTF-8"):
        decode(b"\xff\xfea", "prompt.txt")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_checkpoint_with_byte_order_marks(tmp_path, encoding):
    """Is converted to the same file as one without."""
    weights = hub.random_weights(hub.LITE)
    folder = hub.hub_folder(tmp_path / "model", hub.LITE, weights, files=2)
    convert(folder, tmp_path / "expected.gguf")
    for path in folder.glob("*.json"):
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    convert(folder, tmp_path / "marked.gguf")
    assert (tmp_path / "marked.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "a JSON list"),
        (b"\xff\xfe{", "not valid UTF-16"),
        (b'{"a": "\xe9"}', "not valid UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, data, words):
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(PymlaError, match=rf"config.json: .*{words}"):
        read_json(tmp_path / "config.json")
