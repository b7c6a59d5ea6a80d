"""The attention temperature: queries that grow with their position."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionTemperature:
    """Queries are multiplied by ``1 + scale * ln(1 + position // length)`` (`pymla.backend.Rope.temper`).

    Mistral-Large-3 has it: without it, softmax over an ever longer context becomes ever more even.
    """

    scale: float
    length: int  # below this position nothing changes
