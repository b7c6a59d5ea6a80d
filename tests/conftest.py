"""Tests import the scripts of tools/ and bench/, and the helpers beside them. They see no GPU: what runs on one is
tested in the simulator, and on the card by bench/gpu.py."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("tools", "bench"))]

os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def signals_of_the_tests(monkeypatch):
    """The command line, which tests call in their own process, would take Ctrl-C over."""
    monkeypatch.setattr("pymla.cli.interrupt.take_over", lambda: None)
