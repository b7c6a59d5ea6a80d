"""The engine of a model: texts for many callers, on threads and event loops, computed together.

>>> import pymla
>>> model = pymla.load()                                          # doctest: +SKIP
>>> async def tell(prompt):
...     async for piece in model.engine.generate(prompt, max_tokens=20):
...         print(piece, end="")
"""

import dataclasses
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pymla import checks
from pymla.backend import Progress
from pymla.engine.driving import MAX_RUNNING, STEP_TOKENS, Driver
from pymla.engine.generation import Generation, Submission
from pymla.engine.requests import Constraint
from pymla.engine.runner import LocalRunner
from pymla.engine.speculation import DraftModel, NextnDrafter, NgramDrafter, StepTimes, step_bytes
from pymla.engine.speculation.step import MOST, Speculation
from pymla.errors import PymlaError
from pymla.text.constraints import Grammar, grammar_of
from pymla.text.sampling import SamplingParams

if TYPE_CHECKING:
    from pymla.engine.language_model import LanguageModel

#: Who drafts: prompt lookup, a draft model, or the block of the model that predicts further tokens (MTP).
DRAFTERS = ("ngram", "draft", "mtp")

#: Texts of one prompt that can be asked for together.
MOST_TEXTS = 1024


class Engine:
    """Generates texts of a model for many callers. A model has one of its own, `LanguageModel.engine`.

    Each step computes a token of every text that somebody reads, and slices of the prompts that came in; texts join and
    leave from step to step. What texts begin with alike is computed once. Where the cache is too small for all of them
    the youngest ones wait.

    Parameters
    ----------
    language_model : LanguageModel
    max_running : int
        Texts that a step computes, at most; others wait.
    step_tokens : int
        Tokens of prompts in a step in which nothing is generated, at most.

    Raises
    ------
    PymlaError
        A number is out of range.
    """

    def __init__(
        self, language_model: "LanguageModel", *, max_running: int = MAX_RUNNING, step_tokens: int = STEP_TOKENS
    ):
        self._language_model = language_model
        self.driver = Driver(
            LocalRunner(language_model.model),
            checks.integer("max_running", max_running, 1),
            checks.integer("step_tokens", step_tokens, 1),
        )
        self._times = StepTimes(step_bytes(language_model.config, language_model.file.tensors))
        self._speculations: dict[str, Speculation] = {}

    def speculation(self, drafter: str, *, draft_model: "LanguageModel | None" = None, most: int = MOST) -> Speculation:
        """Speculation for texts of this engine: what `generation` takes as `speculation`.

        Parameters
        ----------
        drafter : str
            "ngram", "draft" or "mtp" (`DRAFTERS`).
        draft_model : LanguageModel, optional
            For "draft": a smaller model with the same vocabulary.
        most : int
            Tokens of the longest draft.

        Raises
        ------
        PymlaError
            There is no such drafter, the draft model is missing, not asked for or of another vocabulary, or this model
            was loaded without the block.
        """
        checks.choice("drafter", drafter, DRAFTERS)
        if (drafter == "draft") != (draft_model is not None):
            raise PymlaError("drafter `draft` needs a `draft_model`, and the others take none")
        if draft_model is not None:
            return Speculation(DraftModel(draft_model, self._language_model), self._times, most=most)
        made = NgramDrafter() if drafter == "ngram" else NextnDrafter(self._language_model.model)
        return Speculation(made, self._times, most=most)

    def generation(self, prompt: str | Iterable[int], **options: Any) -> Generation:
        """A text to be generated, to iterate over with ``for`` or ``async for``. Arguments and errors are those of
        `LanguageModel.generation`."""
        return self.generations(prompt, 1, **options)[0]

    def generations(
        self,
        prompt: str | Iterable[int],
        n: int,
        *,
        max_tokens: int | None = None,
        stop: str | Iterable[str] | None = (),
        progress: Progress | None = None,
        special: bool = False,
        shown_tokens: Collection[int] = (),
        constraint: Constraint | None = None,
        speculation: Speculation | str | None = None,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        regex: str | None = None,
        grammar: str | Grammar | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """`n` texts that continue one prompt, which is computed once. Further arguments and errors are those of
        `LanguageModel.generation`.

        Where a seed is given, the text number i has the i-th seed from there on.
        """
        n = checks.integer("n", n, 1, MOST_TEXTS)
        if constraint and n > 1:
            raise PymlaError(f"`constraint` follows one text, and `n` is {n}; give `json_schema`, `regex` or `grammar`")
        model = self._language_model
        params = SamplingParams.of(sampling, model.recommended)
        ids = model.prompt_ids(prompt)
        given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        compiled = grammar_of(model.tokenizer, model.config.vocab_size, given)
        if compiled and constraint:
            raise PymlaError(
                "a text has one constraint; give `constraint`, or one of `json_schema`, `regex`, `grammar`"
            )
        if isinstance(speculation, str):
            if speculation not in self._speculations:
                self._speculations[speculation] = self.speculation(speculation)
            speculation = self._speculations[speculation]
        submission = Submission(self.driver)

        def generation(params: SamplingParams) -> Generation:
            own = compiled.matcher() if compiled else constraint
            rest = progress, special, own, speculation, submission, shown_tokens
            return Generation(self.driver, model.tokenizer, ids, params, max_tokens, stop, *rest)

        return [generation(each) for each in _of_texts(params.for_tokenizer(model.tokenizer), n)]

    def stream(self, prompt: str | Iterable[int], **options: Any) -> Iterator[str]:
        """Pieces of a text as they are generated; arguments and errors as for `generation`."""
        return iter(self.generation(prompt, **options))

    async def generate(self, prompt: str | Iterable[int], **options: Any) -> AsyncIterator[str]:
        """Pieces of a text as they are generated, on an event loop; arguments and errors as for `generation`. Closing
        the iterator, or cancelling the task that reads it, ends the text."""
        generation = self.generation(prompt, **options)
        try:
            async for piece in generation:
                yield piece
        finally:
            generation.close()


def _of_texts(params: SamplingParams, n: int) -> list[SamplingParams]:
    """The parameters of several texts, which differ by their seeds."""
    if n == 1 or params.seed is None:
        return [params] * n
    return [dataclasses.replace(params, seed=params.seed + i) for i in range(n)]
