"""`pymla.load` and the model it gives: the Python interface."""

import os
from dataclasses import replace

import numpy as np
import pytest
from make_model import PRESETS, make_model
from test_cli import rewritten

import pymla
from pymla import cpu, ggml
from pymla.engine.loading import demo_path
from pymla.engine.memory_plan import PROCESS_BYTES
from pymla.engine.report import Report
from pymla.errors import PymlaError
from pymla.files import gguf_writer
from pymla.files.gguf_reader import ModelFile
from pymla.files.gguf_writer import NewTensor
from pymla.make.model_metadata import ARCHITECTURE
from pymla.models.config import ModelConfig
from pymla.reference.formats import plain_rows
from pymla.scratch import HOST


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, PRESETS["tiny"], qtype="q8_0", seed=6)
    return path


@pytest.fixture(scope="module")
def tiny(path):
    with pymla.load(path, ctx=128) as language_model:
        yield language_model


class Told(Report):
    """Keeps what it is told."""

    def __init__(self):
        self.calls = []

    def warn(self, message):
        self.calls.append(("warn", message))

    def running(self, where):
        self.calls.append(("running", where))

    def uploading(self, done, total):
        self.calls.append(("uploading", done, total))

    def reading(self, done, total):
        self.calls.append(("reading", done, total))

    def checking(self, done, total):
        self.calls.append(("checking", done, total))

    def arranging(self, done, total):
        self.calls.append(("arranging", done, total))

    def compiling(self, done, total, name):
        self.calls.append(("compiling", done, total, name))

    def of(self, kind):
        return [call[1:] for call in self.calls if call[0] == kind]


@pytest.fixture
def memory(monkeypatch):
    """Say how much memory there is."""

    def say(nbytes):
        for module in ("fitting", "loading"):
            monkeypatch.setattr(f"pymla.engine.{module}.available_memory", lambda: nbytes)

    return say


# The interface --------------------------------------------------------------------------------------------------------


def test_text_and_tokens(tiny):
    ids = tiny.tokenize("abc")
    assert ids == tiny.tokenizer.encode("abc")
    assert tiny.tokenize("abc", add_bos=False) == [token for token in ids if token != tiny.tokenizer.bos_id]
    assert tiny.detokenize(ids) == "abc"
    options = {"max_tokens": 9, "temperature": 0}
    text = tiny.generate("abc", **options)
    assert text
    assert text == "".join(tiny.stream("abc", **options)) == tiny.generate(ids, **options)
    assert tiny.generate(np.array(ids), **options) == text
    assert tiny.generate("abc", stop=text[1:3], **options) == text[: text.index(text[1:3])]
    assert isinstance(tiny.config, ModelConfig)


def test_logits(tiny):
    ids = tiny.tokenize("abcdef")
    logits = tiny.logits(ids)
    assert (logits.dtype, logits.shape) == (np.float32, (len(ids), tiny.config.vocab_size))
    assert np.isfinite(logits).all()
    # A token's logits do not know what follows it, nor what was asked before.
    np.testing.assert_allclose(tiny.logits(ids[:3]), logits[:3], rtol=0, atol=2e-2 * np.abs(logits).max())
    np.testing.assert_array_equal(tiny.logits(ids), logits)
    assert tiny.logits(ids[:1]).shape == (1, tiny.config.vocab_size)
    assert tiny.model.cache.free_pages == 2


@pytest.mark.parametrize("ids", [[], [[1, 2]], [1.5], ["a"], 3, [True]])
def test_ids_that_are_none(tiny, ids):
    for call in (tiny.logits, tiny.generate):
        with pytest.raises(PymlaError, match="list of at least one integer"):
            call(ids)


@pytest.mark.parametrize(("ids", "extreme"), [([-1], "-1"), ([1, 10**6], "1000000"), ([2**40], str(2**40))])
def test_ids_outside_the_vocabulary(tiny, ids, extreme):
    for call in (tiny.logits, tiny.generate):
        with pytest.raises(PymlaError, match=f"{extreme}.*the vocabulary has {tiny.config.vocab_size}"):
            call(ids)


def test_too_long_for_the_context(tiny):
    with pytest.raises(PymlaError, match="200 tokens do not fit the context of 128"):
        tiny.logits([1] * 200)
    with pytest.raises(PymlaError, match="prompt has 200 tokens and the context holds 128"):
        tiny.generate([1] * 200)
    assert tiny.model.cache.free_pages == 2


def test_a_closed_model_says_so(path):
    with pymla.load(path, ctx=64) as language_model:
        language_model.generate("a", max_tokens=1)
    for call in (language_model.generate, language_model.stream, language_model.logits):
        with pytest.raises(PymlaError, match=r"tiny.gguf: this model was closed"):
            call([1])
    language_model.close()
    assert language_model.tokenize("abc")


def test_demo_by_default():
    with pymla.load(ctx=64) as language_model:
        assert language_model.file.path == demo_path()
    assert pymla.LanguageModel is type(language_model)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pymla.nothing


# The file -------------------------------------------------------------------------------------------------------------


def test_tensors_are_looked_at_first(path, tmp_path, monkeypatch):
    """A damaged file is refused before a plan is made, kernels are compiled, or a device is looked for."""
    contents = bytearray(path.read_bytes())
    tensor = ModelFile.open(path).tensors["blk.2.ffn_up_shexp.weight"].data
    at = contents.index(tensor.tobytes())
    (tmp_path / "bad.gguf").write_bytes(contents[:at] + bytes(tensor.size) + contents[at + tensor.size :])
    for name in ("Planner", "fit", "placement"):
        monkeypatch.setattr(f"pymla.engine.loading.{name}", lambda *_: pytest.fail("too late"))
    with pytest.raises(PymlaError, match=r"bad.gguf: tensor blk.2.ffn_up_shexp.weight is zero throughout"):
        pymla.load(tmp_path / "bad.gguf", device="cpu")


def test_check_tensors(path, tmp_path):
    contents = bytearray(path.read_bytes())
    tensor = ModelFile.open(path).tensors["blk.2.ffn_up_exps.weight"]
    at = contents.index(tensor.data.tobytes()) + 34 * 333
    contents[at : at + 2] = [0xFF, 0xFF]
    (tmp_path / "nan.gguf").write_bytes(contents)
    assert pymla.load(tmp_path / "nan.gguf", ctx=64).model
    told = Told()
    with pytest.raises(
        PymlaError, match=r"nan.gguf: tensor blk.2.ffn_up_exps.weight holds NaN or infinity in 1 of 8192 blocks"
    ):
        pymla.load(tmp_path / "nan.gguf", ctx=64, check_tensors=True, report=told)
    (done, total), size = told.of("checking")[-1], sum(t.data.nbytes for t in ModelFile.open(path).tensors.values())
    assert done == total == size
    told = Told()
    pymla.load(path, ctx=64, check_tensors=True, report=told)
    assert told.of("checking")[-1] == (size, size)
    pymla.load(path, ctx=64, report=told)
    assert told.of("checking")[-1] == (size, size)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_file_that_is_cut_while_kernels_are_compiled(path, tmp_path, monkeypatch, device):
    """Its weights are not read any more: that would end the process by a signal."""
    copy = tmp_path / "cut.gguf"
    copy.write_bytes(path.read_bytes())
    size, backends = copy.stat().st_size, pymla.engine.loading.placement

    def cut(*args):
        os.truncate(copy, 100_000)
        return backends(*args)

    monkeypatch.setattr("pymla.engine.loading.placement", cut)
    with pytest.raises(PymlaError, match=rf"cut.gguf: the file has 100000 bytes and had {size} when it was opened"):
        pymla.load(copy, device=device, ctx=64)


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, ["`device` is 'tpu'", "reference"]),
        ({"device": "cuda"}, ["`device` cuda: "]),
        ({"gpu_layers": 3}, ["`gpu_layers` and `cpu_moe` are for a GPU", "there is none here"]),
        ({"cpu_moe": True, "device": "cpu"}, ["`cpu_moe` are for a GPU", "`device` is cpu"]),
        ({"gpu_layers": 1, "device": "reference"}, ["`gpu_layers`", "`device` is reference"]),
        ({"gpu_layers": 0}, ["`gpu_layers` is 0", "from 1 on"]),
        ({"gpu_layers": "most"}, ["`gpu_layers` is 'most'", "or all"]),
        ({"mla": "4"}, ["`mla` is '4'", "auto"]),
        ({"mla": None}, ["`mla` is None"]),
        ({"cache_type": "q3_0"}, ["`cache_type` is 'q3_0'", "q8_0"]),
        ({"threads": 0}, ["`threads` is 0"]),
        ({"threads": -1}, ["`threads` is -1"]),
        ({"threads": 100_000}, ["`threads` is 100000", f"1 to {cpu.usable_cores()} cores"]),
        ({"ctx": 0}, ["`ctx` is 0"]),
        ({"ctx": -5}, ["`ctx` is -5"]),
        ({"ctx": 10**9}, ["`ctx` is 1000000000", "context goes from 1 to"]),
    ],
)
def test_options_that_are_refused(path, options, words):
    with pytest.raises(PymlaError) as caught:
        pymla.load(path, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("mla", ["0", 1, "2", 3])
@pytest.mark.parametrize("cache_type", ["f32", "q8_0"])
def test_variants_agree(tiny, path, mla, cache_type):
    ids = tiny.tokenize("abcdefgh")
    with pymla.load(path, mla=mla, cache_type=cache_type, ctx=64, threads=1) as other:
        assert (other.model.mla, other.model.cache.cache_type, other.model.ctx) == (str(mla), cache_type, 64)
        assert cpu.thread_count() == 1
        expected = tiny.logits(ids)
        np.testing.assert_allclose(other.logits(ids), expected, rtol=0, atol=0.1 * np.abs(expected).max())


def test_context_is_the_models_by_default(path):
    with pymla.load(path) as language_model:
        assert language_model.model.ctx == language_model.config.context_length


def test_vocabulary_larger_than_the_embedding(path, tmp_path):
    tokens = pymla.load(path, ctx=64).file.metadata["tokenizer.ggml.tokens"]
    # Without their kinds, all tokens are ordinary ones.
    for name, words in (("ok", tokens), ("more", [*tokens, "one more"])):
        metadata = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": None}
        rewritten(path, tmp_path / f"{name}.gguf", metadata=metadata)
    pymla.load(tmp_path / "ok.gguf", ctx=64)
    with pytest.raises(PymlaError, match=rf"more.gguf: .*tokenizer.ggml.tokens has {len(tokens) + 1}"):
        pymla.load(tmp_path / "more.gguf", ctx=64)


def test_interleaved_rows_give_the_logits_of_plain_ones(tmp_path, monkeypatch):
    """Bit for bit, on either backend; and the kernel that makes them plain is compiled with a word of it."""
    path = make_model(tmp_path / "mixed.gguf", PRESETS["tiny"], qtype="q8_0_r8")
    file, tensors = ModelFile.open(path), []
    for info in file.tensors.values():
        data, qtype = info.data, ggml.plain_type(info.qtype)
        if qtype != info.qtype:
            data = plain_rows(data.reshape(-1, ggml.row_bytes(info.qtype, info.shape[-1])), info.qtype)
        tensors.append(NewTensor(info.name, info.shape, qtype, lambda data=data: [data]))
    metadata = {key: value for key, value in file.metadata.items() if key != "general.architecture"}
    gguf_writer.write(tmp_path / "plain.gguf", ARCHITECTURE, metadata, tensors)
    told, ids = Told(), np.arange(40)
    monkeypatch.setattr("pymla.cpu.runtime.compiling.Compiled.is_ready", False)  # as if no kernel had been compiled
    for device in ("reference", "cpu"):
        with pymla.load(path, device=device, ctx=64, report=told) as mixed:
            actual = mixed.logits(ids)
        with pymla.load(tmp_path / "plain.gguf", device=device, ctx=64) as plain:
            np.testing.assert_array_equal(actual, plain.logits(ids))
    assert any(name == "plain_words" for _, _, name in told.of("compiling"))


# Memory and progress --------------------------------------------------------------------------------------------------


def test_report_hears_of_progress(path, monkeypatch):
    told = Told()
    # As if no kernel had been compiled or kept.
    monkeypatch.setattr("pymla.cpu.runtime.compiling.Compiled.is_ready", False)
    with pymla.load(path, ctx=64, report=told) as language_model:
        layers = language_model.config.num_hidden_layers
        size = language_model.file.nbytes
    assert told.of("reading")[-1] == (size, size)
    assert told.of("arranging") == [(i + 1, layers) for i in range(layers)]
    done, total, name = told.of("compiling")[0]
    assert (done, bool(name)) == (0, True)
    assert told.of("compiling")[-1][:2] == (total, total)
    assert told.of("warn") == []


def test_no_progress_of_compiling_where_all_is_compiled(path):
    pymla.load(path, ctx=64).close()
    told = Told()
    pymla.load(path, ctx=64, report=told)
    assert told.of("compiling") == []


def test_context_is_cut_to_the_memory(tmp_path, memory, capfd):
    limit = 1 << 20
    path = tmp_path / "long.gguf"
    make_model(path, replace(PRESETS["tiny"], context_length=limit), qtype="q8_0", seed=1)
    memory(16 << 30)
    told = Told()
    with pymla.load(path, report=told) as language_model:
        assert language_model.model.ctx == limit
        cache = limit * language_model.model.cache.row_bytes
    assert told.of("warn") == []
    memory(PROCESS_BYTES + HOST.most_expanded + cache // 2)
    with pymla.load(path, report=told) as language_model:
        found = language_model.model.ctx
        assert language_model.generate("abc", max_tokens=3)
    assert limit // 4 < found < limit // 2
    assert found % 64 == 0
    assert told.of("warn") == [(f"the memory holds a context of {found} tokens, of the model's {limit}",)]
    # Asked for, it is refused, with the plan; what was found fits.
    with pytest.raises(PymlaError, match=rf"not enough memory for {limit} tokens of context: cache .*scratch .*`ctx`"):
        pymla.load(path, ctx=limit)
    assert pymla.load(path, ctx=found).model.ctx == found
    capfd.readouterr()
    pymla.load(path)
    assert capfd.readouterr().err.startswith("pymla: warning: the memory holds a context of")


def test_no_memory_at_all(path, memory):
    memory(1 << 20)
    with pytest.raises(PymlaError, match="not enough memory for 64 tokens"):
        pymla.load(path)


def test_a_file_larger_than_the_memory_runs_with_a_warning(path, memory, monkeypatch):
    expected = pymla.load(path, ctx=64).generate("abc", max_tokens=5, temperature=0)
    available = 4 << 30
    memory(available)
    opened = pymla.engine.loading.ModelFile.open

    def large(path, overrides):
        file = opened(path, overrides)
        file.nbytes = 5 << 30
        return file

    monkeypatch.setattr("pymla.engine.loading.ModelFile.open", large)
    told = Told()
    language_model = pymla.load(path, ctx=64, report=told)
    ((warning,),) = told.of("warn")
    assert "tiny.gguf takes 5.00 GiB and 4.00 GiB of memory are available" in warning
    assert told.of("reading") == []
    assert language_model.generate("abc", max_tokens=5, temperature=0) == expected
