"""Files that pymla writes, as the gguf package reads them."""

import gguf
import numpy as np
import pytest

from pymla import ggml
from pymla.files import gguf_writer
from pymla.files.gguf_writer import NewTensor

METADATA = {
    "flag": True,
    "count": 7,
    "rate": 0.5,
    "text": "déjà",
    "words": ["a", "b"],
    "integers": np.array([1, -2], np.int64),
    "floats": np.array([0.5, -1.0]),
}


def test_metadata_of_every_kind(tmp_path):
    gguf_writer.write(tmp_path / "m.gguf", "test", METADATA, ())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert [key for key in fields if not key.startswith("GGUF.")] == ["general.architecture", *METADATA]
    assert fields["general.architecture"].contents() == "test"
    for key, value in METADATA.items():
        assert fields[key].contents() == (value.tolist() if isinstance(value, np.ndarray) else value)
    kinds = gguf.GGUFValueType
    assert fields["count"].types == [kinds.UINT32]
    assert fields["rate"].types == [kinds.FLOAT32]
    assert fields["integers"].types == [kinds.ARRAY, kinds.INT32]
    assert fields["floats"].types == [kinds.ARRAY, kinds.FLOAT32]


def test_what_gguf_cannot_hold_is_left_out(tmp_path):
    gguf_writer.write(tmp_path / "m.gguf", "test", {"text": "", "words": []}, ())
    assert not {"text", "words"} & gguf.GGUFReader(tmp_path / "m.gguf").fields.keys()


@pytest.mark.parametrize("pieces", [1, 3])
def test_tensors_in_pieces(tmp_path, pieces):
    rng, calls = np.random.default_rng(0), []
    blocks = rng.integers(0, 256, (6, 2 * 18), np.uint8)
    vector = rng.standard_normal(5, np.float32)
    tensors = [
        NewTensor("blocks", (2, 3, 64), ggml.Q4_0, lambda: np.split(blocks, pieces)),
        NewTensor("vector", (5,), ggml.F32, lambda: [vector]),
    ]
    assert [tensor.nbytes for tensor in tensors] == [blocks.nbytes, vector.nbytes]
    gguf_writer.write(tmp_path / "m.gguf", "test", {}, tensors, lambda *call: calls.append(call))
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert list(found) == ["blocks", "vector"]
    assert found["blocks"].tensor_type == ggml.Q4_0
    assert found["blocks"].shape.tolist() == [64, 3, 2]
    assert found["blocks"].data.tobytes() == blocks.tobytes()
    assert found["vector"].data.tobytes() == vector.tobytes()
    total = blocks.nbytes + vector.nbytes
    assert calls == [(blocks.nbytes * (i + 1) // pieces, total) for i in range(pieces)] + [(total, total)]
