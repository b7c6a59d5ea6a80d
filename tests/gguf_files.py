"""GGUF files for tests, written by the gguf package and not by pymla's own writer."""

import gguf
from gguf import GGMLQuantizationType, GGUFValueType

KINDS = {
    bool: GGUFValueType.BOOL,
    float: GGUFValueType.FLOAT32,
    int: GGUFValueType.INT64,
    list: GGUFValueType.ARRAY,
    str: GGUFValueType.STRING,
}


def write(path, metadata=None, tensors=None, arch="deepseek2"):
    """A file with some metadata and tensors.

    Parameters
    ----------
    metadata : dict of values, or of (GGUFValueType, value) where a Python type does not say it; None is left out
    tensors : dict of (array, ggml type)
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata or {}).items():
        add(writer, key, value)
    for name, (data, qtype) in (tensors or {}).items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType(qtype))
    return finish(writer, path)


def add(writer, key, value):
    """Add a value of the metadata."""
    if value is None:
        return
    kind, value = value if isinstance(value, tuple) else (KINDS[type(value)], value)
    if kind == GGUFValueType.ARRAY:
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, kind)


def finish(writer, path):
    """Write all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
