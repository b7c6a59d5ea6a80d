"""Speculation: a drafter proposes tokens, the model verifies all of them in one step, and a text gets several tokens at
once, distributed as without.

`drafting` is what drafters have in common, which are `ngram`, `draft_model` and `nextn`, `verify` accepts or replaces
drafted tokens, `length` and `times` adapt how many are drafted, and `step` puts these together.
"""

from pymla.engine.speculation.draft_model import DraftModel
from pymla.engine.speculation.drafting import NO_DRAFT, Draft, Drafter
from pymla.engine.speculation.length import DraftLength
from pymla.engine.speculation.nextn import NextnDrafter
from pymla.engine.speculation.ngram import NgramDrafter
from pymla.engine.speculation.step import SpeculatedText, Speculation
from pymla.engine.speculation.times import StepTimes, step_bytes
from pymla.engine.speculation.verify import verify

__all__ = [
    "NO_DRAFT",
    "Draft",
    "DraftLength",
    "DraftModel",
    "Drafter",
    "NextnDrafter",
    "NgramDrafter",
    "SpeculatedText",
    "Speculation",
    "StepTimes",
    "step_bytes",
    "verify",
]
