"""Choosing the next token by its logit: llama.cpp's samplers, in any order, and a draw.

`SamplingParams` says how. `Sampler` does it for one sequence: it makes a chain of steps of the parameters (`chain`),
and each step takes the tokens that may still come next with their logits, a `Pool`, and gives those that are left of
them. The steps stand in a module for each family: `penalties`, `dry`, `filters`, `temperature`, `mirostat`, `adaptive`.
docs/sampling.md has all parameters with their formulas.
"""

from pymla.text.sampling.params import SamplingParams
from pymla.text.sampling.pool import Candidates, draw
from pymla.text.sampling.sampler import Sampled, Sampler, sample_batch, sample_or_error

__all__ = ["Candidates", "Sampled", "Sampler", "SamplingParams", "draw", "sample_batch", "sample_or_error"]
