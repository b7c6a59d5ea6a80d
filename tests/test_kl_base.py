"""Files of log-probabilities in llama.cpp's format: as bytes, both ways, damaged, and interrupted."""

import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymla.errors import PymlaError
from pymla.files import kl_base
from pymla.reference import log_probabilities

CTX, VOCAB, WINDOWS = 6, 5, 3
RECORDS = 2  # after tokens 3 and 4
WORDS = VOCAB + 1 + 4


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, CTX)).astype(np.int32)


@pytest.fixture
def records():
    logits = np.random.default_rng(1).standard_normal((WINDOWS * RECORDS, VOCAB)).astype(np.float32)
    sums = log_probabilities.log_sum_exp(logits, np.empty(len(logits)))
    return log_probabilities.encode(logits, sums, np.empty((len(logits), WORDS), np.uint16))


def as_bytes(tokens, records):
    """The format, by its description."""
    head = b"_logits_" + struct.pack("<iii", CTX, VOCAB, WINDOWS) + struct.pack(f"<{tokens.size}i", *tokens.ravel())
    return head + b"".join(struct.pack(f"<{WORDS}H", *row) for row in records.tolist())


@pytest.fixture
def written(tmp_path, tokens, records):
    path = tmp_path / "base.kld"
    path.write_bytes(as_bytes(tokens, records))
    return path


def read_all(path):
    with kl_base.BaseFile(path) as base:
        return base.tokens, [base.records(i, 0, kl_base.records_of_window(base.ctx)) for i in range(len(base.tokens))]


def test_sizes():
    assert kl_base.record_words(5) == kl_base.record_words(6) == 10
    assert kl_base.records_of_window(6) == 2
    assert kl_base.records_of_window(512) == 255
    assert kl_base.records_of_window(7) == 3


def test_what_is_written(tmp_path, tokens, records):
    path = tmp_path / "base.kld"
    with kl_base.writing(path, tokens, VOCAB) as base:
        base.write(records[:1])
        base.write(records[1:])
    assert path.read_bytes() == as_bytes(tokens, records)
    assert path.stat().st_size == kl_base.file_bytes(WINDOWS, CTX, VOCAB)


def test_what_is_read(written, tokens, records):
    with kl_base.BaseFile(written) as base:
        assert (base.ctx, base.vocab_size) == (CTX, VOCAB)
        np.testing.assert_array_equal(base.tokens, tokens)
        np.testing.assert_array_equal(base.records(2, 1, 1), records[5:])
        np.testing.assert_array_equal(base.records(0, 0, 2), records[:2])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PymlaError("x")])
def test_an_interrupted_file_leaves_the_old_one(written, tokens, records, error):
    before = written.read_bytes()

    def write():
        with kl_base.writing(written, tokens + 1, VOCAB + 1) as base:
            base.write(records[:1])
            raise error

    with pytest.raises(type(error)):
        write()
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_file_without_all_records_does_not_appear(tmp_path, tokens, records):
    with pytest.raises(ValueError, match="1 records"), kl_base.writing(tmp_path / "x", tokens, VOCAB) as base:
        base.write(records[:-1])
    with pytest.raises(ValueError, match="6 of 10 words"), kl_base.writing(tmp_path / "x", tokens, VOCAB) as base:
        base.write(np.concatenate([records, records]))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room(tmp_path, tokens, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(PymlaError, match="base: needs 0"), kl_base.writing(tmp_path / "base", tokens, VOCAB):
        pass
    assert not list(tmp_path.iterdir())


def refused(path, data, *words):
    path.write_bytes(data)
    with pytest.raises(PymlaError) as caught:
        read_all(path)
    assert all(word in str(caught.value) for word in (str(path), *words)), caught.value


def test_what_is_no_such_file(tmp_path, tokens, records):
    path, data = tmp_path / "base", as_bytes(tokens, records)
    refused(path, b"", "is no file of log-probabilities")
    refused(path, b"GGUF" + data, "is no file of log-probabilities")
    refused(path, data[:15], "has 15 bytes", "it was cut")
    refused(path, data[:-1], f"has {len(data) - 1} bytes", f"take {len(data)}")
    refused(path, data + b"\0", f"has {len(data) + 1} bytes")
    for sizes in ((2, 5, 3), (6, 0, 3), (6, 5, 0), (-1, 5, 3)):
        refused(path, data[:8] + struct.pack("<iii", *sizes) + data[20:], "the file is damaged")
    refused(path, data[:8] + struct.pack("<iii", *[2**31 - 1] * 3) + data[20:], "was cut, or is damaged")
    refused(path, data[:24] + struct.pack("<i", VOCAB) + data[28:], "token 1 is 5, and the vocabulary has 5")
    with pytest.raises(PymlaError, match="none: No such file"):
        kl_base.BaseFile(tmp_path / "none")
    with pytest.raises(PymlaError, match="Is a directory"):
        kl_base.BaseFile(tmp_path)


@pytest.mark.parametrize(("scale", "low"), [(np.nan, -1), (1e-4, np.inf), (-1e-4, -1), (1e-4, 0), (1.0, -20)])
def test_records_that_no_model_has(tmp_path, tokens, records, scale, low):
    records[3, :4] = np.array([scale, low], np.float32).view(np.uint16)
    refused(tmp_path / "base", as_bytes(tokens, records), "record 1 of window 1", "the file is damaged")


def test_a_file_that_becomes_shorter(written):
    with kl_base.BaseFile(written) as base:
        with written.open("rb+") as file:
            file.truncate(100)
        with pytest.raises(PymlaError, match="became shorter"):
            base.records(2, 0, 2)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_bytes(data):
    rng = np.random.default_rng(0)
    sound = as_bytes(rng.integers(0, VOCAB, (WINDOWS, CTX)), np.zeros((WINDOWS * RECORDS, WORDS), np.uint16))
    found = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(found) - 1) | st.integers(8, 24))
        found[at : at + 4] = data.draw(st.binary(max_size=8) | st.sampled_from([b"\xff\xff\xff\x7f", b"\0" * 4]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base")
        path.write_bytes(found)
        message = ""
        try:
            tokens, records = read_all(path)
            assert len(records) == len(tokens)
        except PymlaError as error:
            message = str(error)
        assert message.isprintable()
        assert len(message) < 1000
