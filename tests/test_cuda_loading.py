"""Models on a GPU from a file to text, in the simulator: what is sent there, what it computes, what a user reads."""

import json
import mmap
import subprocess
import sys
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import simulated  # noqa: F401 - skips this file where kernels are not simulated
from make_model import PRESETS, make_model
from test_loading import Told

import pymla
from pymla import cpu
from pymla.cli import main
from pymla.cpu.limits import Limits
from pymla.cuda import backend, memory
from pymla.cuda.runtime import simulated_memory
from pymla.engine.planning import Planner
from pymla.engine.split import Split
from pymla.errors import PymlaError
from pymla.files.gguf_reader import ModelFile
from pymla.models.config import ModelConfig
from pymla.models.weights import Weights
from pymla.tensor import QTensor

SHAPE = replace(
    PRESETS["tiny"],
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_attention_heads=2,
    vocab_size=288,
    q_lora_rank=32,
    kv_lora_rank=32,
    context_length=256,
)
WHOLE = Split(3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_model(path, SHAPE, qtype="q8_0", seed=3)
    return path


@pytest.fixture(scope="module")
def expected(path):
    """What the reference generates behind "x". No other token comes near those that it chooses."""
    with pymla.load(path, device="reference") as language_model:
        return language_model.generate("x", max_tokens=2, temperature=0)


@pytest.fixture
def run(monkeypatch, capfd):
    """Call the console script; returns exit code, standard output, standard error."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["pymla", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capfd.readouterr()

    return call


def free(monkeypatch, nbytes):
    """Say how much memory the GPU has."""
    monkeypatch.setattr(memory, "free_memory", lambda: nbytes)


def planner_of(path):
    file = ModelFile.open(path)
    return Planner(ModelConfig.from_gguf(file), file, "q8_0", "auto")


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where", "device"),
    [
        ({}, "all 2 layers", "cuda"),
        ({"gpu_layers": 1}, "the last of 2 layers", "cpu+cuda"),
        ({"gpu_layers": "all", "cpu_moe": True}, "all 2 layers, routed experts on the CPU", "cpu+cuda"),
    ],
)
def test_the_same_text_as_the_reference(path, expected, options, where, device):
    told = Told()
    with pymla.load(path, device="cuda", ctx=64, report=told, **options) as language_model:
        assert told.of("running") == [(f"CUDA simulator: {where}",)]
        assert language_model.device == device
        assert language_model.generate("x", max_tokens=2, temperature=0) == expected


def test_logits_and_an_end(path):
    ids = [5, 6]
    with pymla.load(path, device="reference") as language_model:
        expected = language_model.logits(ids)
    language_model = pymla.load(path, device="cuda", ctx=64)
    np.testing.assert_allclose(language_model.logits(ids), expected, rtol=0, atol=0.05 * np.abs(expected).max())
    held = weakref.ref(language_model.model)
    language_model.close()
    language_model.close()
    assert held() is None
    with pytest.raises(PymlaError, match="was closed"):
        language_model.logits(ids)


def test_no_memory_ends_the_request_only(path, expected, monkeypatch):
    def full(nbytes):
        raise MemoryError

    with pymla.load(path, device="cuda", ctx=64) as language_model:
        stream = language_model.stream("x", max_tokens=2, temperature=0)
        with monkeypatch.context() as patch:
            patch.setattr(simulated_memory, "buffer", full)
            with pytest.raises(PymlaError, match=r"the device has no .* for another array.*`ctx`"):
                next(stream)
        assert language_model.model.cache.free_pages == 1
        assert expected.startswith(language_model.generate("x", max_tokens=1, temperature=0))


# What is sent ---------------------------------------------------------------------------------------------------------


def arrays(weights):
    """All arrays of some weights, by name."""
    found = {"token_embd": weights.token_embd, "output": weights.output, "output_norm": weights.output_norm}
    for i, layer in enumerate(weights.layers):
        found |= {f"{i}.{field.name}": getattr(layer, field.name) for field in fields(layer)}
    found = {name: each.data if isinstance(each, QTensor) else each for name, each in found.items()}
    return {name: each for name, each in found.items() if each is not None}


@pytest.mark.parametrize("layout", ["kv_b", "split", "all"])
@pytest.mark.parametrize("split", [WHOLE, Split(3, True), Split(2), Split(1), Split(1, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_lie_where_the_plan_says(tmp_path, layout, split, tied):
    make_model(tmp_path / "m.gguf", replace(SHAPE, tie_word_embeddings=tied), qtype="q8_0", layout=layout)
    planner = planner_of(tmp_path / "m.gguf")
    file, config = ModelFile.open(tmp_path / "m.gguf"), planner.config
    placement, sent = split.placement(config, cpu, backend), []
    weights = Weights.from_gguf(file, config, placement=placement, uploading=sent.append)
    plan = planner.device(split, 64)
    on_device = {name: each for name, each in arrays(weights).items() if isinstance(each, memory.DeviceArray)}
    nbytes = sum({each.address: each.nbytes for each in on_device.values()}.values())
    assert nbytes == plan.weights + plan.derived == sent[-1]
    assert sent == sorted(sent)
    on_host = arrays(Weights.from_gguf(file, config))
    for name, array in on_device.items():
        np.testing.assert_array_equal(memory.to_host(array), on_host[name], err_msg=name)
        assert array.contiguous, name
    assert len(arrays(weights)) == len(on_host)
    uploaded = planner.uploaded(split)
    assert ("blk.1.ffn_up_exps.weight" in uploaded) == ("1.ffn_up_exps" in on_device) == (not split.cpu_moe)
    assert (weights.output is weights.token_embd) == (tied and placement.output is placement.embedding)


@pytest.mark.parametrize("split", [WHOLE, Split(3, True)])
def test_halves_of_one_tensor_are_sent_once(path, split):
    file = ModelFile.open(path)
    gate, up = (file.tensors.pop(f"blk.1.ffn_{name}_exps.weight") for name in ("gate", "up"))
    experts, inner, columns = gate.shape
    data = np.concatenate([each.data.reshape(experts, inner, -1) for each in (gate, up)], axis=1).reshape(-1)
    name = "blk.1.ffn_gate_up_exps.weight"
    file.tensors[name] = gate._replace(name=name, shape=(experts, 2 * inner, columns), data=data)
    config, sent = ModelConfig.from_gguf(file), []
    plan = Planner(config, file, "q8_0", "auto").device(split, 64)
    placement = split.placement(config, cpu, backend)
    layer = Weights.from_gguf(file, config, placement=placement, uploading=sent.append).layers[1]
    assert sent[-1] == plan.weights
    for half, whole in ((layer.ffn_gate_exps, gate), (layer.ffn_up_exps, up)):
        found = half.data if split.cpu_moe else memory.to_host(half.data)
        np.testing.assert_array_equal(found.reshape(-1), whole.data)


def test_progress(path):
    told = Told()
    with pymla.load(path, device="cuda", gpu_layers=1, ctx=64, report=told):
        planner = planner_of(path)
        plan = planner.device(Split(1), 64)
        assert told.of("uploading")[-1] == (plan.weights, plan.weights)
        # Only the host's part of the file is made present.
        done, total = told.of("reading")[-1]
        uploaded = planner.uploaded(Split(1))
        stays = [each.data.nbytes for name, each in ModelFile.open(path).tensors.items() if name not in uploaded]
        assert done == total
        assert sum(stays) <= total <= sum(stays) + 2 * len(stays) * mmap.PAGESIZE
    told = Told()
    with pymla.load(path, device="cpu", ctx=64, report=told):
        assert told.of("uploading") == told.of("running") == []


# What fits ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_loaded(path, monkeypatch):
    planner = planner_of(path)
    free(monkeypatch, planner.device(Split(1), 64).total)
    monkeypatch.setattr(Weights, "from_gguf", lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(PymlaError, match=r"GPU's memory does not hold all 2 layers with 64 tokens.*`gpu_layers` 1"):
        pymla.load(path, device="cuda", gpu_layers="all", ctx=64)
    free(monkeypatch, 1 << 20)
    for options in ({"device": "cuda"}, {"gpu_layers": 1}, {"cpu_moe": True}):
        with pytest.raises(PymlaError, match=r"does not hold the last of 2 layers.*Choose `device` cpu"):
            pymla.load(path, ctx=64, **options)


def test_what_is_chosen_is_said(path, monkeypatch):
    planner, told = planner_of(path), Told()
    free(monkeypatch, planner.device(Split(3, True), 64).total)
    with pymla.load(path, ctx=64, report=told) as language_model:
        assert language_model.device == "cpu+cuda"
    ((where,),) = told.of("running")
    assert where.startswith("CUDA simulator: all 2 layers, routed experts on the CPU (the whole model takes 0.")
    free(monkeypatch, 1 << 20)
    with pymla.load(path, ctx=64, report=told) as language_model:
        assert language_model.device == "cpu"
    assert told.of("running")[-1] == ("the CPU: the GPU's memory does not hold a layer of the model",)


def test_context_is_cut_to_the_memory(path, monkeypatch):
    planner, told = planner_of(path), Told()
    monkeypatch.setattr("pymla.engine.planning.LEAST_CTX", 64)
    free(monkeypatch, planner.device(WHOLE, 128).total)
    with pymla.load(path, device="cuda", report=told) as language_model:
        assert language_model.model.ctx == 128
    assert told.of("warn") == [("the memory holds a context of 128 tokens, of the model's 256",)]


# The command line -----------------------------------------------------------------------------------------------------


def test_generate(run, path, expected):
    options = "-m", path, "x", "-n", 2, "--temperature", 0, "--ctx", 64, "-ngl", 1, "--cpu-moe"
    code, out, err = run("generate", *options, "--json")
    assert code == 0, err
    assert (json.loads(out)["text"], json.loads(out)["device"]) == (expected, "cpu+cuda")
    assert err.startswith("pymla: running on CUDA simulator: the last of 2 layers, routed experts on the CPU\n")


def test_bench(run, path, monkeypatch, tmp_path):
    monkeypatch.setattr("pymla.cuda.limits.measure", lambda: Limits(read=3e12, int8=1e15))
    files = "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv"
    options = "-m", path, "--pp", 1, "--tg", 1, "--depths", 0
    code, out, err = run("bench", *options, *files, "--device", "cuda")
    assert code == 0, err
    assert out.startswith("CUDA simulator, sm_80, ")
    assert "reads 3000.0 GB/s, int8 1000000 GMAC/s" in out
    assert "tiny.gguf, mla auto, q8_0 cache, cuda\n" in out
    report = json.loads((tmp_path / "a.json").read_text())
    (row,) = report["rows"]
    assert (report["device"], report["gpu"], row["device"]) == ("cuda", "CUDA simulator", "cuda")
    assert row["tg_share"] > 0
    assert (tmp_path / "a.csv").read_text().splitlines()[1].startswith("tiny.gguf,auto,q8_0,cuda,1,1,1,0,")


def test_a_process_of_its_own(path, expected):
    options = "-m", path, "x", "-n", "1", "--temperature", "0", "--ctx", "64", "--device", "cuda"
    command = sys.executable, "-m", "pymla", "generate", *options
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"x{expected}".startswith(done.stdout.removesuffix("\n"))
    assert len(done.stdout) > 2
    first, *_, last = done.stderr.splitlines()
    assert first == "pymla: running on CUDA simulator: all 2 layers"
    assert "tokens/s" in last
    assert "memory bound" not in last
