"""The README's commands from a Hugging Face folder to text, as a user types them: a checkpoint in FP8, V3's shape."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hub import V3, YARN, hub_folder, random_weights

from pymla import ggml
from pymla.cli.app import group
from pymla.files.gguf_reader import ModelFile

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: Rows that blocks of 256 divide, so that tensors get K-quants.
CONFIG = V3 | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "max_position_embeddings": 1024,
    "rope_parameters": YARN | {"original_max_position_embeddings": 256},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def commands():
    """The lines of the README's block that begins with ``pymla convert``."""
    (block,) = re.findall(r"```sh\n(pymla convert .*?)```", README, re.DOTALL)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


def in_float8(weights, seed=3):
    """A checkpoint whose matrices, but for the embeddings, the output and routers, are codes with scales of blocks."""
    rng = np.random.default_rng(seed)
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight
        if weight.ndim == 2 and "layers" in name and not name.endswith("mlp.gate.weight"):
            codes = rng.integers(0, 127, weight.shape, np.uint8) | rng.integers(0, 2, weight.shape, np.uint8) << 7
            blocks = [-(-size // 128) for size in weight.shape]
            stored[name] = "F8_E4M3", codes
            stored[name + "_scale_inv"] = rng.uniform(0.5e-3, 2e-3, blocks).astype(np.float32)
    return stored


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the commands have run, and what they printed, by the name of the command."""
    folder = tmp_path_factory.mktemp("files")
    hub_folder(folder / "DeepSeek-V3", CONFIG, in_float8(random_weights(CONFIG)), dtype="BF16", files=2)
    (folder / "calibration.txt").write_text(README[:3000], encoding="utf-8")
    (folder / "wiki.test.raw").write_text(README[3000:6000], encoding="utf-8")
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pymla.cli.interrupt.take_over", lambda: None)
        for program, command, *arguments in commands():
            assert program == "pymla"
            done = CliRunner().invoke(group, [command, *arguments])
            assert done.exit_code == 0, (command, done.output, done.exception)
            printed[command] = done.output
    return folder, printed


def test_commands_are_those_that_the_readme_promises():
    assert [command for _, command, *_ in commands()] == ["convert", "imatrix", "quantize", "perplexity", "generate"]


def test_types(folder):
    converted, quantised = (
        {name: tensor.qtype for name, tensor in ModelFile.open(path).tensors.items()}
        for path in (folder[0] / "v3-bf16.gguf", folder[0] / "v3-q4_k_m.gguf")
    )
    assert converted["blk.1.ffn_up_exps.weight"] == converted["token_embd.weight"] == ggml.BF16
    assert converted["blk.1.ffn_gate_inp.weight"] == quantised["blk.1.ffn_gate_inp.weight"] == ggml.F32
    assert quantised["blk.1.ffn_up_exps.weight"] == ggml.Q4_K
    assert quantised["output.weight"] == ggml.Q6_K


def test_no_weight_of_the_importance_matrix_is_missing(folder):
    assert "has nothing for" not in folder[1]["quantize"]


def test_perplexity_is_printed(folder):
    assert re.search(r"PPL = \d+\.\d+ ± \d+\.\d+", folder[1]["perplexity"])


def test_text_is_generated(folder):
    assert "generated" in folder[1]["generate"]
