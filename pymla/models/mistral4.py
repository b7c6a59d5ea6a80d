"""The transformer of Mistral 4, which is DeepSeek-V2's with another choice of groups.

transformers' ``Mistral4ForCausalLM``; llama.cpp's ``mistral4.cpp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymla.models.deepseek2 import DeepSeek2

if TYPE_CHECKING:
    from pymla.models.metadata import Metadata


class Mistral4(DeepSeek2):
    """Scores are a softmax, and yet a group of experts counts as its two best, as in V3."""

    @staticmethod
    def own_fields(read: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
        return {"group_score": "top2"}
