"""A model to write, for tests that interrupt its writing, also in processes of their own."""

import numpy as np

from pymla import ggml
from pymla.files import gguf_parts
from pymla.files.gguf_parts import NewFile
from pymla.files.gguf_writer import NewTensor

METADATA = {"general.architecture": "test", "words": ["a", "b"]}


class Model:
    """Ten tensors of three rows each, which count how often their pieces are made."""

    def __init__(self, qtype=ggml.F32):
        rng = np.random.default_rng(0)
        self.values = rng.standard_normal((10, 3, 8), np.float32)
        self.made = []
        self.tensors = [NewTensor(f"t{i}", (3, 8), qtype, lambda i=i: self.pieces(i)) for i in range(10)]
        if qtype == ggml.F16:
            self.tensors = [each._replace(encode=lambda rows: rows.astype(np.float16)) for each in self.tensors]

    def pieces(self, i):
        for row in self.values[i]:
            self.made.append(i)
            yield row

    def files(self, path, parts=1):
        if parts == 1:
            return [NewFile(path, METADATA, self.tensors)]
        return gguf_parts.in_parts(path, METADATA, gguf_parts.by_number(self.tensors, -(-10 // parts)))
