"""What `bench/gpu.py` times, run once at toy sizes in the simulator: what it calls exists and takes its arguments."""

import dataclasses

import gpu_models
import gpu_records
import gpu_times
import pytest
import simulated  # noqa: F401

from pymla import ggml
from pymla.cuda import limits
from pymla.cuda.graph import Graph
from pymla.measure import sweep

FOUND = limits.Limits(1e12, 1e12)


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Of functions whose launches are simulated, and take a second each."""

    def seconds(run, runs=1):
        run()
        return [1.0] * runs

    monkeypatch.setattr(limits, "seconds", seconds)
    monkeypatch.setattr(limits, "measure", lambda: FOUND)
    sizes = {"LAUNCHES": 1, "COLD": 0, "HIDDEN": 64, "HEADS": 2, "RANK": 32, "NOPE": 16, "ROPE": 16, "V": 32}
    sizes |= {"EXPERTS": 4, "USED": 2, "INNER": 32}
    for name, value in {**sizes, "INDEX_HEADS": 2, "INDEX_WIDTH": 32, "CHOSEN": 8, "SPARSE_HEADS": 2}.items():
        monkeypatch.setattr(gpu_times, name, value)
    return gpu_records.Records(tmp_path / "records", "test")


def found(records):
    return gpu_records.read(records._path)


def test_kernels_are_timed(records):
    gpu_times.matvec(records, FOUND, ggml.Q4_0, 5, 64, tokens=1)
    gpu_times.matvec(records, FOUND, ggml.F16, 5, 64, tokens=2)
    gpu_times.matmul(records, FOUND, ggml.Q8_0, 5, 64, 9)
    for form in ("absorbed", "absorbed_materialised", "full"):
        gpu_times.decode(records, FOUND, form, "f16", 2, 64, 2)
    gpu_times.prompt(records, 64, tokens=8)
    for tokens in (1, 3):
        gpu_times.choose(records, FOUND, "f16", tokens, 70)
        gpu_times.sparse(records, "f16", tokens, 70)
    gpu_times.experts(records, FOUND, 1)
    gpu_times.experts(records, FOUND, 9)
    results = found(records)
    assert [each["failure"] for each in results] == [None] * 13
    # The f16 cache of two sequences of 64 tokens has rows of 48 values.
    assert next(each["rate"] for each in results if each["name"].startswith("absorbed f16")) == 2 * 64 * 48 * 2


def test_the_device_is_described(records, monkeypatch):
    monkeypatch.setattr(gpu_times, "HOST_LAUNCHES", 2)
    gpu_times.device(records, simulate=False)
    values = {each["name"]: each["value"] for each in found(records)}
    assert values["copy bandwidth, TB/s"] == 1
    assert values["int8 on tensor cores, TOP/s"] == 2
    assert values["launch from Python, µs"] > 0


def test_the_sweep(records, monkeypatch):
    monkeypatch.setattr(gpu_models, "SHAPE", dataclasses.replace(gpu_models.SMALL, num_hidden_layers=3))
    monkeypatch.setattr(gpu_models, "CTX", 8)
    monkeypatch.setattr(gpu_models, "PROMPT", 3)
    monkeypatch.setattr(gpu_models, "TG", 4)
    monkeypatch.setattr(Graph, "enabled", True)
    monkeypatch.setattr(sweep._Engine, "warm_up", lambda engine: None)
    gpu_models.sweep(records, quick=True)
    results = found(records)
    assert [(each["graph"], each["n_kv"]) for each in results] == [("on", 0), ("on", 5), ("off", 0), ("off", 5)]
    assert all(each["s_tg"] > 0 for each in results)
    assert results[0]["s_pp"] > 0
