"""Writes tests/golden/converted.json: what llama.cpp's converter makes of the folders of tests/hub_models.py.

    python tools/golden_converted.py LLAMA_CPP VERSION

LLAMA_CPP is a source tree of llama.cpp with ``convert_hf_to_gguf.py``, VERSION where it comes from. torch,
transformers, sentencepiece, tiktoken and mistral-common are needed. For each folder the file has all metadata, and the
type, shape and digest of each tensor, of files converted to F32 and to F16.

Two things in the converter are replaced, because no public model is at hand: it knows pre-tokenizers by a digest of ids
that real vocabularies give, so that it is told their names; and Kimi's tokenizer is code of the model's repository, in
whose place it gets the file's ranks and special tokens.
"""

import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "converted.json"
TYPES = ("f32", "f16")

#: Names of pre-tokenizers by the tokenizer of a model of tests/hub_models.py.
_PRE = {"bpe": "deepseek-coder", "glm": "glm4", "tiktoken": "kimi-k2"}


def listing(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file, and of each tensor a text with its type, shape (NumPy order) and digest."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {
        tensor.name: f"{tensor.tensor_type.name} {tensor.shape.tolist()[::-1]} {digest(tensor.data.tobytes())}"
        for tensor in reader.tensors
    }
    metadata = {name: summary(value) for name, value in sorted(fields.items())}
    return {"metadata": metadata, "tensors": dict(sorted(tensors.items()))}


def summary(value: Any, longest: int = 8) -> Any:
    """A value of a file's metadata; of a longer list its length and digest."""
    if not isinstance(value, list) or len(value) <= longest:
        return value
    return {"length": len(value), "sha256": digest(json.dumps(value).encode())}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def convert_all(source: Path, folders: Path) -> None:
    """Convert every folder with llama.cpp's converter, in its own process, which has llama.cpp's gguf package."""
    sys.path[:0] = [str(source), str(source / "gguf-py"), str(ROOT), str(ROOT / "tests")]
    import runpy

    import conversion.base
    import transformers
    from hub_models import MODELS

    for name, model in MODELS.items():
        pre = _PRE.get(model.tokenizer, "")
        conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
        if model.tokenizer == "tiktoken":
            transformers.AutoTokenizer.from_pretrained = lambda folder, **_: _kimi_tokenizer(Path(folder))
        else:
            transformers.AutoTokenizer.from_pretrained = lambda folder, **_: _fast_tokenizer(Path(folder))
        for qtype in TYPES:
            out = folders / f"{name}.{qtype}.gguf"
            sys.argv = ["convert_hf_to_gguf.py", str(folders / name), "--outfile", str(out), "--outtype", qtype]
            sys.argv += ["--mistral-format"] if model.file == "params.json" else []
            runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def _fast_tokenizer(folder: Path) -> Any:
    """The tokenizer of a tokenizer.json, whatever class the model's configuration names. The converter of V3.2 insists
    on a tokenizer that puts BOS in front of a text."""
    import transformers

    class Tokenizer(transformers.PreTrainedTokenizerFast):
        pass

    tokenizer = Tokenizer(tokenizer_file=str(folder / "tokenizer.json"))
    Tokenizer.add_bos_token = True  # not before: with it, a tokenizer is made only if it has a BOS
    return tokenizer


def _kimi_tokenizer(folder: Path) -> Any:
    """What the converter asks of Kimi's TikTokenTokenizer; it has no fast tokenizer's interface."""
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(folder / "tiktoken.model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()}
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), len(ranks) + 256)}
    return SimpleNamespace(model=SimpleNamespace(_mergeable_ranks=ranks), special_tokens=special)


def main(source: str, version: str) -> None:
    """Write the folders, convert them in another process, and list what came out."""
    sys.path[:0] = [str(ROOT / "tests")]
    from hub_models import MODELS, write_folder

    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = Path(place)
        for name in MODELS:
            write_folder(folders / name, name)
        subprocess.run([sys.executable, __file__, "--convert", source, place], check=True)
        for name in MODELS:
            f32, f16 = (listing(folders / f"{name}.{qtype}.gguf") for qtype in TYPES)
            models[name] = f32 | {"tensors_f16": f16["tensors"]}
    about = {"program": "convert_hf_to_gguf.py of llama.cpp", "version": version}
    about["date"] = datetime.date.today().isoformat()
    GOLDEN.write_text(json.dumps(about | {"models": models}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert_all(Path(sys.argv[2]).resolve(), Path(sys.argv[3]))
    else:
        main(*sys.argv[1:])
