"""Choosing the next token: on the host, where logits lie already."""

from pymla.text.sampling import Sampler

__all__ = ["Sampler"]
