"""Choosing tokens: a row of logits of V2-Lite's vocabulary, and a batch of 16.

The probabilities of the logits fall with their rank by Zipf's law, as those of texts do. A step of 16 sequences takes
some 470 ms on V2-Lite with two cores: 5 % of it are 23 ms.
"""

import numpy as np
import pytest

from pymla import cpu
from pymla.text.sampling import Sampler, SamplingParams
from pymla.text.sampling.dry import Breakers

VOCABULARY, HISTORY = 102400, 4096
OPEN = {"top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1}
CASES = {
    "default": {},
    "greedy": {"temperature": 0},
    "open": OPEN,
    "nucleus": OPEN | {"top_p": 0.95},
    "penalties": {"repetition_penalty": 1.1},
    "dry": {"dry_multiplier": 0.8, "dry_window": 0, "dry_sequence_breakers": Breakers({7: [()]})},
    "sigma": OPEN | {"top_n_sigma": 1},
    "typical": OPEN | {"typical_p": 0.95},
    "xtc": {"xtc_probability": 0.5, "dynatemp_range": 0.5},
    "mirostat": {"mirostat": 1},
    "mirostat 2": {"mirostat": 2},
    "masked": {},
    "logprobs": {"logprobs": 5},
}


def text_like(rows):
    """Logits, float32 (rows, V)."""
    rng = np.random.default_rng(0)
    falling = -1.2 * np.log(np.arange(1, VOCABULARY + 1)) + 0.3 * rng.standard_normal((rows, VOCABULARY))
    return rng.permuted(falling, axis=1).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("case", CASES)
def bench_sampling(measure, case, rows):
    rng = np.random.default_rng(1)
    logits, history = text_like(rows), rng.integers(0, 500, HISTORY)
    samplers = [Sampler(SamplingParams(seed=i, **CASES[case]), history.tolist()) for i in range(rows)]
    # Half of the vocabulary, which takes longer than few tokens.
    words = rng.integers(0, 1 << 32, VOCABULARY // 32, dtype=np.uint32) if case == "masked" else None
    chosen = []

    def run():
        chosen[:] = cpu.sampling.sample_batch(samplers, logits, [words] * rows)

    def checks():
        exact = logits.astype(np.float64)
        expected = exact - np.log(np.exp(exact).sum(1, keepdims=True))
        tokens = [each.token for each in chosen]
        yield np.array([each.logprob for each in chosen]), expected[np.arange(rows), tokens]

    measure(run, checks, nbytes=logits.nbytes, rtol_max=2e-6, reason="exponentials are in float32")
