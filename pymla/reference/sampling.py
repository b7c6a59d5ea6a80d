"""Choosing the next token: on the host, for logits of any float type."""

from pymla.text.sampling import Sampler, sample_batch

__all__ = ["Sampler", "sample_batch"]
