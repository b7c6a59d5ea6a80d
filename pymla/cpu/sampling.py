"""Choosing the next token: on the host, where logits lie already."""

from pymla.text.sampling import Sampler, sample_batch

__all__ = ["Sampler", "sample_batch"]
