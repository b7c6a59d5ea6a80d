"""`pymla.engine.filecheck`: what is refused, by name, before anything is compiled; `inspect` and `load` always
agree."""

import dataclasses
import os

import numpy as np
import pytest
from cases import TINY
from make_model import PRESETS, make_model
from mutations import Mutator, write

import pymla
from pymla import cpu, ggml
from pymla.cli.inspect_report import report
from pymla.engine import filecheck
from pymla.engine.filecheck import examine
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.reference.quant import quantise

# Damaged at random ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mutators(tmp_path_factory):
    """Of a small model of every structure."""
    folder = tmp_path_factory.mktemp("sound")
    layouts, types = ("kv_b", "split", "all"), ("q8_0", "f32", "q4_0", "f16", "q6_k")
    paths = [
        make_model(folder / f"{name}.gguf", shape, layout=layouts[i % 3], qtype=types[i % 5], seed=i)
        for i, (name, shape) in enumerate(TINY.items())
    ]
    return [Mutator(path) for path in paths]


def told_by_load(path, device):
    """Why the file does not run; None where it does."""
    try:
        language_model = pymla.load(path, device=device, ctx=1)
    except PymlaError as error:
        return str(error).removeprefix(f"{path}: ")
    with language_model:
        try:
            language_model.logits([0])
        except PymlaError as error:
            if "the model's weights are damaged, or overflow" not in str(error):
                raise
    return None


def told_by_inspect(path):
    """The first problem; None where there is none."""
    try:
        found = report(ModelFile.open(path))
    except PymlaError as error:
        return str(error).removeprefix(f"{path}: ")
    assert found["runs"] is not bool(found["problems"])
    return found["problems"][0] if found["problems"] else None


def agree(mutator, path, seed, device="reference"):
    """Check that load and inspect say the same of a damaged file; returns what."""
    what = mutator.write(path, seed)
    try:
        loaded, inspected = told_by_load(path, device), told_by_inspect(path)
    except Exception as error:
        raise AssertionError(f"seed {seed}, {what}: {error!r}") from error
    assert loaded == inspected, f"seed {seed}, {what}"
    assert loaded is None or "\n" not in loaded
    return loaded


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("device", "seeds"), [("reference", range(100)), ("cpu", range(1000, 1020))])
def test_inspect_says_what_load_does(mutators, tmp_path, device, seeds):
    path = tmp_path / "m.gguf"
    told = [agree(mutators[seed % len(mutators)], path, seed, device) for seed in seeds]
    assert len(seeds) * 0.3 < len(told) - told.count(None) < len(seeds)
    assert len({message.split("gguf")[-1] for message in told if message}) > len(seeds) * 0.4


# One thing changed ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return ModelFile.open(make_model(tmp_path_factory.mktemp("sound") / "tiny.gguf", "tiny", qtype="q8_0", seed=3))


@pytest.fixture
def changed(sound, tmp_path):
    """A function that writes a model with other metadata or tensors: `tensors` maps names to bytes, to bytes, type and
    shape, or to None for none."""

    def changed(metadata=(), tensors=(), source=sound):
        found = dict(source.tensors)
        for name, value in dict(tensors).items():
            old = found.pop(name, None) or source.tensors["output_norm.weight"]
            if value is not None:
                data, qtype, shape = value if isinstance(value, tuple) else (value, old.qtype, old.shape)
                data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
                found[name] = old._replace(name=name, data=data, qtype=qtype, shape=shape)
        metadata = {k: v for k, v in (source.metadata | dict(metadata)).items() if v is not None}
        return write(tmp_path / "changed.gguf", metadata, list(found.values()))

    return changed


@pytest.fixture
def refused(monkeypatch):
    """A function that checks that a file is refused before anything is planned or compiled, and what inspect says."""

    def refused(path, *words, **options):
        with monkeypatch.context() as patch:
            for name in ("Planner", "available_memory", "fit", "placement"):
                patch.setattr(f"pymla.engine.loading.{name}", lambda *_, **__: pytest.fail("too late"))
            with pytest.raises(PymlaError) as caught:
                pymla.load(path, **options)
        message = str(caught.value)
        for word in (str(path), *words):
            assert word in message, message
        found = report(ModelFile.open(path), **options)
        assert found["problems"][0] == message.removeprefix(f"{path}: ")
        return found["problems"]

    return refused


def floats(sound, name):
    """The values of a float32 tensor, to be written to."""
    return sound.tensors[name].data.view(np.float32).copy()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "blk.1.exp_probs_b.bias",
        "blk.1.ffn_gate_inp.weight",
        "blk.0.attn_norm.weight",
        "blk.2.attn_q_a_norm.weight",
        "blk.2.attn_kv_a_norm.weight",
        "blk.3.ffn_norm.weight",
        "output_norm.weight",
    ],
)
def test_nan_and_infinity_where_all_is_looked_at(sound, changed, refused, name, value):
    data = floats(sound, name)
    data[5] = value
    refused(changed(tensors={name: data}), f"tensor {name} holds NaN or infinity in 1 of {len(data)} values", "5]; ")


@pytest.mark.parametrize("qtype", [ggml.F16, ggml.BF16, ggml.Q8_0, ggml.Q4_1], ids=ggml.NAME.get)
def test_a_router_of_any_type(sound, changed, refused, qtype):
    name = "blk.2.ffn_gate_inp.weight"
    shape = sound.tensors[name].shape
    data = quantise(floats(sound, name).reshape(shape), qtype)
    path = changed(tensors={name: (data, qtype, shape)})
    assert examine(ModelFile.open(path)).problems == []
    data.reshape(-1)[2 * ggml.BLOCK_BYTES[qtype] :][:2] = [0xC0, 0x7F]  # NaN as float16 and as bfloat16
    refused(changed(tensors={name: (data, qtype, shape)}), name, f"[0, {2 * ggml.BLOCK_SIZE[qtype]}]", "NaN")


@pytest.mark.parametrize("name", ["blk.1.attn_output.weight", "blk.3.ffn_up_exps.weight", "token_embd.weight"])
def test_nan_elsewhere(sound, changed, refused, name):
    """Of large tensors all values are looked at only if that is asked for."""
    data = sound.tensors[name].data.copy()
    data.reshape(-1, 34)[70, :2] = [0, 0x7C]
    path = changed(tensors={name: data})
    assert examine(ModelFile.open(path)).problems == []
    (problem,) = refused(
        path, f"tensor {name} holds NaN or infinity in 1 of {data.size // 34} blocks", check_tensors=True
    )
    shape = sound.tensors[name].shape
    assert str([int(i) for i in np.unravel_index(70 * 32, shape)]) in problem


def test_all_damaged_tensors_are_shown(sound, changed):
    names = "blk.1.ffn_norm.weight", "blk.3.attn_norm.weight", "blk.3.attn_output.weight"
    path = changed(tensors={name: np.zeros_like(sound.tensors[name].data) for name in names})
    problems = report(ModelFile.open(path))["problems"]
    assert [problem.split(" is zero")[0] for problem in problems] == [f"tensor {name}" for name in names]


@pytest.mark.parametrize("options", [{}, {"check_tensors": True}])
@pytest.mark.parametrize(
    "name",
    [
        "output_norm.weight",
        "blk.1.ffn_gate_inp.weight",
        "blk.2.attn_q_b.weight",
        "blk.3.ffn_down_exps.weight",
        "output.weight",
    ],
)
def test_zero_throughout(sound, changed, refused, name, options):
    words = f"tensor {name} is zero throughout, as an unfinished download leaves it"
    data = sound.tensors[name].data.copy()
    refused(changed(tensors={name: np.zeros_like(data)}), words, **options)
    if sound.tensors[name].qtype == ggml.Q8_0:
        data.reshape(-1, 34)[:, :2] = 0
        refused(changed(tensors={name: data}), words, **options)


def test_zeros_that_sound_files_have(sound, changed):
    """A router without a bias, tokens that pad the vocabulary, experts without use."""
    tensors = {name: each.data.copy() for name, each in sound.tensors.items()}
    tensors["blk.1.exp_probs_b.bias"][:] = 0
    tensors["token_embd.weight"].reshape(512, -1)[400:] = 0
    tensors["output.weight"].reshape(512, -1)[400:] = 0
    for name in ("gate", "up", "down"):
        tensors[f"blk.2.ffn_{name}_exps.weight"].reshape(8, -1)[[0, 3, 7]] = 0
    file = ModelFile.open(changed(tensors=tensors))
    assert examine(file).problems == []
    assert examine(file, check_tensors=True).problems == []


@pytest.mark.parametrize("missing", [1000, 4096, 5000, 50_000])
def test_the_end_was_never_written(sound, tmp_path, refused, missing):
    contents = sound.path.read_bytes()
    path = tmp_path / "unfinished.gguf"
    path.write_bytes(contents[:-missing] + bytes(missing))
    refused(path, "tensor blk.3.", "is zero", "download")


def test_a_hole_between(sound, tmp_path, refused):
    """Found by samples if it is large, else by a look at everything."""
    contents, path = bytearray(sound.path.read_bytes()), tmp_path / "hole.gguf"
    info = sound.tensors["token_embd.weight"]
    start = info.data.ctypes.data - sound._sources[0].begin + 21_000
    contents[start : start + 1500] = bytes(1500)
    path.write_bytes(contents)
    assert examine(ModelFile.open(path)).problems == []
    refused(path, "tensor token_embd.weight is zero from [77, ", "] to [82, ", check_tensors=True)
    contents[start : start + 40_000] = bytes(40_000)
    path.write_bytes(contents)
    refused(path, "tensor token_embd.weight is zero from [77, ")


# Layers ---------------------------------------------------------------------------------------------------------------


def layers(sound, count, nextn=()):
    """Tensors for layers from the fourth on, copies of the third; those of `nextn` predict further tokens."""
    copies = {}
    for layer in range(4, count):
        for name, each in sound.tensors.items():
            if name.startswith("blk.3."):
                copies[name.replace("blk.3.", f"blk.{layer}.")] = each.data, each.qtype, each.shape
        if layer in nextn:
            norm = sound.tensors["output_norm.weight"]
            copies[f"blk.{layer}.nextn.enorm.weight"] = norm.data, norm.qtype, norm.shape
    return copies


def block_count(count, nextn=None):
    return {"deepseek2.block_count": count, "deepseek2.nextn_predict_layers": nextn}


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_layers_than_there_are(changed, refused, count):
    refused(changed(block_count(count)), f"block_count is {count}, so {count} layers", f"blk.{count}.", "of 4 layers")


def test_more_layers_than_there_are(changed, refused):
    problems = refused(changed(block_count(5)), "tensor blk.4.", "missing")
    assert len(problems) > 10


@pytest.mark.parametrize(
    ("metadata", "count", "nextn"),
    [
        (block_count(5, 1), 5, [4]),  # as it should be
        (block_count(5, 1), 4, []),  # declared, and not there
        (block_count(6, 2), 5, [4]),  # one of two
        (block_count(4), 5, [4]),  # there, and not declared
        (block_count(4, 0), 6, [4, 5]),
    ],
)
def test_layers_that_predict_further_tokens_are_left_out(sound, changed, metadata, count, nextn):
    found = examine(ModelFile.open(changed(metadata, layers(sound, count, nextn))))
    assert found.problems == []
    assert found.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("metadata", "count", "nextn", "words"),
    [
        (block_count(5, 1), 5, [], ["block_count is 5 with nextn_predict_layers 1, so 4 layers", "of 5 layers"]),
        (block_count(4, 1), 5, [4], ["block_count is 4 with nextn_predict_layers 1, so 3 layers", "blk.3."]),
        (block_count(5), 5, [4], ["block_count is 5, but tensor blk.4.nextn.enorm.weight", "layer 4"]),
        (block_count(4), 6, [5], ["block_count is 4, so 4 layers", "blk.4.", "of 5 layers"]),
    ],
)
def test_layers_that_contradict_the_metadata(sound, changed, refused, metadata, count, nextn, words):
    refused(changed(metadata, layers(sound, count, nextn)), *words)


def test_a_file_of_layers_that_predict_further_tokens_alone(sound, changed, refused):
    """As llama.cpp's converter writes them, for use beside the model's own file: refused as what it is."""
    without = dict.fromkeys(name for name in sound.tensors if name.startswith("blk."))
    path = changed(block_count(5, 1), without | layers(sound, 5, [4]))
    problems = refused(path, "holds nothing but layers that predict further tokens (nextn)")
    assert len(problems) == 1


def test_shared_experts_that_are_not_declared(changed, refused):
    path = changed({"deepseek2.expert_shared_count": 0})
    refused(path, "tensor blk.1.ffn_gate_shexp.weight is there", "expert_shared_count")


# What is found when ---------------------------------------------------------------------------------------------------


def test_problems_come_in_their_order(sound, changed):
    """Metadata, tokenizer, tensors, values."""
    norm = floats(sound, "output_norm.weight") * 0
    tensors = {"blk.2.ffn_norm.weight": None, "output_norm.weight": norm}
    path = changed({"tokenizer.ggml.pre": "none", "deepseek2.block_count": 3}, tensors)
    problems = list(map(str, examine(ModelFile.open(path)).problems))
    words = ("tokenizer.ggml.pre", "block_count", "blk.2.ffn_norm.weight is missing", "output_norm.weight is zero")
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))


def test_types_that_are_not_run_are_told_once_each(sound, changed, refused):
    names = [f"blk.{i}.attn_output.weight" for i in range(4)]
    shape = sound.tensors[names[0]].shape
    kinds = [ggml.ID["I8"]] * 2 + [ggml.ID["I16"]] * 2
    sizes = [np.ones(int(np.prod(shape[:-1])) * ggml.row_bytes(kind, shape[-1]), np.uint8) for kind in kinds]
    tensors = {n: (data, kind, shape) for n, data, kind in zip(names, sizes, kinds, strict=True)}
    # A tensor that the model does not use may be of any type.
    tensors["other.weight"] = tensors[names[0]]
    problems = refused(changed(tensors=tensors), "tensor blk.0.attn_output.weight has type I8", "runs F32")
    assert [problem.split(", which")[0] for problem in problems] == [
        "tensor blk.0.attn_output.weight has type I8",
        "tensor blk.2.attn_output.weight has type I16",
    ]


def test_factors_of_matrices(changed, refused):
    """As llama.cpp writes them beside NVFP4."""
    ones = np.ones(1, np.float32)
    names = [f"blk.{i}.ffn_down_exps.scale" for i in (1, 2)]
    for factors in (2 * ones, ones.astype(np.float16)):
        kind = ggml.F32 if factors.dtype == np.float32 else ggml.F16
        tensors = dict.fromkeys(names, (factors, kind, (1,)))
        words = "tensor blk.1.ffn_down_exps.scale holds factors of tensor blk.1.ffn_down_exps.weight"
        assert len(refused(changed(tensors=tensors), words, "take a file")) == 1
    assert examine(ModelFile.open(changed(tensors={names[0]: (ones, ggml.F32, (1,))}))).problems == []


def test_interleaved_rows_that_their_plain_type_does_not_hold(sound, changed, refused, monkeypatch):
    monkeypatch.setattr(ggml, "SUPPORTED", (*ggml.SUPPORTED, ggml.IQ1_S))
    name = "blk.0.attn_output.weight"
    rows, columns = sound.tensors[name].shape
    assert columns % 256
    data = np.ones(ggml.tensor_bytes(ggml.IQ1_S_R4, (rows, columns)), np.uint8)
    path = changed(tensors={name: (data, ggml.IQ1_S_R4, (rows, columns))})
    refused(path, f"tensor {name} has type IQ1_S_R4 and rows of {columns} weights", "multiples of 256", "take another")


def test_a_cache_of_another_type(tmp_path, refused):
    """What no cache of the default type holds is refused by default only."""
    path = make_model(tmp_path / "m.gguf", dataclasses.replace(PRESETS["tiny"], kv_lora_rank=48), qtype="f16")
    with pytest.raises(PymlaError, match=r"cache type q8_0 needs a kv_lora_rank that 32 divides, and it is 48"):
        pymla.load(path)
    assert report(ModelFile.open(path))["runs"] is False
    assert examine(ModelFile.open(path), "f16").problems == []


def test_progress_of_a_look_at_everything(sound):
    calls = []
    examine(sound, check_tensors=True, progress=lambda *call: calls.append(call))
    total = sum(each.data.nbytes for each in sound.tensors.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    calls.clear()
    assert examine(sound, progress=lambda *call: calls.append(call)).problems == []
    assert calls == []


def test_a_file_that_is_cut_while_it_is_looked_at(sound, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(sound.path.read_bytes())
    file = ModelFile.open(path)
    monkeypatch.setattr(filecheck, "_layer_problems", lambda *_: os.truncate(path, 50_000) or ())
    with pytest.raises(PymlaError, match=rf"has 50000 bytes and had {file.nbytes} when it was opened"):
        examine(file)


def test_nothing_is_compiled_for_a_bad_file(changed, monkeypatch):
    monkeypatch.setattr(cpu, "compile_for", lambda *_: pytest.fail("compiled"))
    path = changed(tensors={"blk.3.ffn_down_exps.weight": None})
    with pytest.raises(PymlaError, match=r"blk.3.ffn_down_exps.weight is missing"):
        pymla.load(path, device="cpu")
