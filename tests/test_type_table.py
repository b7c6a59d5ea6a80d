"""The benchmark of every type, on little data."""

import json

import numpy as np
import pytest
import type_table
from click.testing import CliRunner

from pymla import ggml
from pymla.cpu import limits


@pytest.fixture
def small(monkeypatch):
    """Small matrices, one round, and limits that nobody measures."""
    monkeypatch.setattr("shapes.COLD", 1)
    monkeypatch.setattr("shares.ROUNDS", (1, 2))
    monkeypatch.setattr(type_table, "MATRICES", {"dense up": (64, 256)})
    monkeypatch.setattr(type_table, "HIDDEN", 256)
    monkeypatch.setattr(type_table, "ROUND_MACS", 1)
    monkeypatch.setattr(limits, "packed_rate", lambda: 1e9)
    monkeypatch.setattr(limits, "measure", lambda: limits.Limits(1e9, 1e9))
    stream = limits.Stream
    monkeypatch.setattr(limits, "Stream", lambda: stream(1 << 20))


def test_types_are_measured_and_recorded(small, tmp_path):
    path = tmp_path / "types.json"
    done = CliRunner().invoke(type_table.main, ["--quick", "--types", "q4_0,f16", "--json", str(path)])
    assert done.exit_code == 0, done.output
    first, second = json.loads(path.read_text())["types"]
    assert (first["type"], second["type"]) == ("Q4_0", "F16")
    assert first["bits"] == 4.5
    assert 0 < first["gemv"]["error"] < 1e-5
    assert first["gemv"]["gb_per_s"] > 0
    assert first["gemm_512"]["packed_share"] == pytest.approx(first["gemm_512"]["gmac_per_s"])
    assert "Q4_0" in done.output


def test_nothing_wrong_is_measured(small, monkeypatch):
    monkeypatch.setattr(type_table.Product, "checks", lambda self: [(np.ones(3), np.full(3, 1.01))])
    done = CliRunner().invoke(type_table.main, ["--quick", "--types", "q4_0"])
    assert done.exit_code == 1
    assert "Q4_0, 1 tokens: relative error 9.9e-03" in done.output


def test_unknown_types_are_named():
    done = CliRunner().invoke(type_table.main, ["--types", f"q4_0,q4_5,{ggml.NAME[ggml.F32]}"])
    assert done.exit_code == 2
    assert "Q4_5: no type that runs" in done.output
