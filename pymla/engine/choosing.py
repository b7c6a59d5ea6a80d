"""The next tokens of the requests of a step: masks, drafts and their verification, and samplers.

Masks of constraints are computed on another thread while the model computes.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import numpy as np

from pymla.backend import Array
from pymla.engine.forward import Outputs
from pymla.engine.requests import Constraint, Request
from pymla.engine.runner import Runner
from pymla.engine.speculation.drafting import NO_DRAFT, Draft
from pymla.engine.speculation.step import SpeculatedText, Speculation
from pymla.errors import PymlaError
from pymla.pages import PAGE
from pymla.text.sampling import Sampled


class Ready(NamedTuple):
    """A request that gets tokens from a step."""

    request: Request
    token: int  # the request's last one among the tokens of the step, before those of the draft
    row: int  # of the step's logits, after this token
    draft: Draft


#: The masks of a request, in place of each token of its draft and behind it, or why there are none.
Masks: TypeAlias = list[np.ndarray | None] | PymlaError


class Chooser:
    """Chooses tokens.

    Parameters
    ----------
    runner : Runner
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self.forget_threads()

    def forget_threads(self) -> None:
        """Begin without threads, as a forked process does."""
        # It has no thread before it is used.
        self._beside = ThreadPoolExecutor(1, "pymla-masks")

    def drafts(self, requests: Items[Request], room: int) -> dict[Request, Draft]:
        """Drafts for those requests of a step that have a drafter and generate.

        Parameters
        ----------
        requests : sequence of Request
            Whose last token is in the step.
        room : int
            Pages that drafts may take together.
        """
        groups: dict[Speculation, list[tuple[Request, SpeculatedText, int]]] = {}
        for request in requests:
            if request.speculation and request.text and request.generated:
                most = self._most(request, room > 0)
                groups.setdefault(request.speculation, []).append((request, request.text, most))
                room -= 1
        drafts: dict[Request, Draft] = {}
        for speculation, group in groups.items():
            own, texts, most_of = zip(*group, strict=True)
            drafts |= zip(own, speculation.draft(texts, most_of, len(requests) - len(group)), strict=True)
        return drafts

    def _most(self, request: Request, has_page: bool) -> int:
        """Tokens that a draft may have: no more than are wanted, and than there are places for. A page is enough."""
        tokens = len(request.tokens)
        most = min(self._runner.ctx - tokens, -tokens % PAGE + (PAGE if has_page else 0), PAGE - 1)
        return most if request.max_tokens is None else min(most, request.max_tokens - request.generated - 1)

    def masks(self, drafts: dict[Request, Draft], requests: Iterable[Request]) -> "dict[Request, Future[Masks]]":
        """Begin to compute the masks of the requests that have a constraint."""
        return {
            request: self._beside.submit(_masks, request.constraint, drafts.get(request, NO_DRAFT).tokens)
            for request in requests
            if request.constraint
        }

    def choose(
        self, ready: list[Ready], outputs: Outputs, pending: "dict[Request, Future[Masks]]"
    ) -> list[list[Sampled] | PymlaError]:
        """The next tokens of every request, one at least, or why there is none.

        Parameters
        ----------
        ready : list of Ready
        outputs : Outputs
            Of the step.
        pending : dict of Request and Future
            Of `masks`.
        """
        masks = {request: future.result() for request, future in pending.items()}
        chosen: dict[Request, list[Sampled] | PymlaError] = {}
        plain: list[Ready] = []
        for each in ready:
            found = masks.get(each.request)
            if isinstance(found, PymlaError):
                chosen[each.request] = found
            elif each.request.generated and each.request.speculation:
                chosen[each.request] = _verified(each, outputs, found)
            else:
                plain.append(each)
        chosen |= self._sampled(plain, outputs.logits, [masks.get(each.request) for each in plain])
        return [chosen[each.request] for each in ready]

    def _sampled(
        self, plain: list[Ready], logits: Array, masks: "Items[Masks | None]"
    ) -> dict[Request, list[Sampled] | PymlaError]:
        """The next token of requests without a draft, all together."""
        if not plain:
            return {}
        rows = [each.row for each in plain]
        if rows != list(range(len(logits))):
            logits = self._runner.take(logits, np.array(rows))
        own = [found[0] if isinstance(found, list) else None for found in masks]
        results = self._runner.sample([each.request.sampler for each in plain], logits, own)
        return {
            each.request: result if isinstance(result, PymlaError) else [result]
            for each, result in zip(plain, results, strict=True)
        }


def _verified(each: Ready, outputs: Outputs, masks: list[np.ndarray | None] | None) -> list[Sampled] | PymlaError:
    """The accepted tokens of a draft and one more."""
    request, draft = each.request, each.draft
    assert request.speculation is not None
    assert request.text is not None
    logits = outputs.logits[each.row : each.row + len(draft.tokens) + 1]
    hidden = None
    if request.speculation.wants_hidden:
        hidden = outputs.hidden[each.token : each.token + len(draft.tokens) + 1]
    try:
        return request.speculation.verify(request.text, request.sampler, logits, draft, hidden=hidden, masks=masks)
    except PymlaError as error:
        return error


def _masks(constraint: Constraint, draft: Items[int]) -> Masks:
    """The masks of a text: the next one, and one behind each token of a draft, as far as it is allowed."""
    accepted = 0
    try:
        masks: list[np.ndarray | None] = [constraint.mask()]
        for token in draft:
            mask = masks[-1]
            if mask is None or not mask[token // 32] >> token % 32 & 1:
                masks.append(None)
                continue
            constraint.accept(token)
            accepted += 1
            masks.append(None if constraint.is_finished else constraint.mask())
    except PymlaError as error:
        return error
    finally:
        constraint.rollback(accepted)
    return masks
