"""The transformer of Mistral 4, which is DeepSeek-V2's with an attention temperature and another choice of groups.

transformers' ``Mistral4ForCausalLM``; llama.cpp's ``mistral4.cpp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymla.models.attention_temperature import AttentionTemperature
from pymla.models.deepseek2 import DeepSeek2

if TYPE_CHECKING:
    from pymla.models.metadata import Metadata

#: `AttentionTemperature.scale` of Mistral-Small-4.
_TEMPERATURE_SCALE = 0.1


class Mistral4(DeepSeek2):
    """Scores are a softmax, and yet a group of experts counts as its two best, as in V3.

    The models are trained with an attention temperature that llama.cpp's converter does not write. A file without the
    key has that of Mistral-Small-4, from the end of the original context on; a scale of 0 switches it off.
    """

    @staticmethod
    def own_fields(read: Metadata, fields: dict[str, Any]) -> dict[str, Any]:
        temperature = fields["attention_temperature"]
        if read.get("attention.temperature_scale", float, None) is None:
            temperature = AttentionTemperature(_TEMPERATURE_SCALE, fields["original_context_length"])
        return {"group_score": "top2", "attention_temperature": temperature}
