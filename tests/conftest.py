"""Tests import the scripts of tools/ and bench/, and the helpers beside them. They see no GPU: what runs on one is
tested in the simulator, and on the card by bench/gpu.py."""

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / folder) for folder in ("tools", "bench"))]

os.environ["CUDA_VISIBLE_DEVICES"] = ""

pytest_plugins = ("lanes",)


def pytest_configure(config):
    from side_by_side import SideBySide

    config.pluginmanager.register(SideBySide())


@pytest.fixture(autouse=True, scope="module")
def garbage_of_other_files():
    """`LanguageModel.close` collects garbage, hundreds of times, and would look at every test and library each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals_of_the_tests(monkeypatch):
    """The command line, which tests call in their own process, would take Ctrl-C over."""
    monkeypatch.setattr("pymla.cli.interrupt.take_over", lambda: None)


@pytest.fixture(scope="session")
def long_model(tmp_path_factory):
    """A model that nothing but an interrupt ends: its context is long and it has no token that ends a text."""
    from make_model import PRESETS, make_model
    from test_cli import rewritten

    from pymla.files.gguf_reader import ModelFile

    path = tmp_path_factory.mktemp("long") / "long.gguf"
    make_model(path, replace(PRESETS["tiny"], context_length=1 << 20), qtype="q8_0", seed=1)
    tokens = ModelFile.open(path).metadata["tokenizer.ggml.tokens"]
    tokens = ["<end>" if token == "<｜end▁of▁sentence｜>" else token for token in tokens]  # no name that ends a text
    without = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": None}
    return rewritten(path, path.with_name("endless.gguf"), metadata=without)
