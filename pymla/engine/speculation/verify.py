"""Which tokens of a draft become part of a text, and the token behind them.

The text has the distribution that it has without a draft, whatever the draft is:

- A certain draft is compared with what the sampler chooses. The sampler does then what it does without a draft, number
  by number of its random stream, and so the same seed gives the same text with and without speculation, as far as the
  model's logits are the same. This is rejection sampling with a distribution of one token: it accepts the token x with
  probability p(x), and draws from the rest of p otherwise.
- A token that was drawn from a distribution q is accepted with probability min(1, p(x) / q(x)); otherwise a token is
  drawn from max(0, p - q), normalised (Leviathan, Kalman, Matias, "Fast inference from transformers via speculative
  decoding", 2023, section 2.3; Chen et al., "Accelerating large language model decoding with speculative sampling",
  2023). No procedure accepts more often: a token is accepted with probability sum(min(p, q)).

p is the sampler's final distribution, after penalties, filters and temperature. The sampler is told of every token
before it is asked about the next one, so that whatever it remembers is what it would be without a draft.
"""

from collections.abc import Sequence

import numpy as np

from pymla.backend import Array, TokenSampler
from pymla.engine.speculation.drafting import Draft
from pymla.text.sampling import Candidates, Sampled, draw


def verify(
    sampler: TokenSampler, logits: Array, draft: Draft, masks: Sequence[np.ndarray | None] | None = None
) -> list[Sampled]:
    """The drafted tokens that are accepted, and one more: the one in place of the first that is not, or behind all.

    Parameters
    ----------
    sampler : TokenSampler
        Of the text. Accepts the tokens that are returned.
    logits : float32 array (n + 1, V)
        After the text, and after each token of the draft; in the memory of the sampler's backend.
    draft : Draft
        n tokens.
    masks : sequence of (uint32 array (ceil(V / 32),) or None), optional
        The tokens that are allowed in place of each drafted token, and behind all, as for `TokenSampler.sample`. None
        is needed behind a drafted token that is not allowed.

    Returns
    -------
    list of Sampled
        1 to n + 1 tokens.

    Raises
    ------
    PymlaError
        As `TokenSampler.sample`.
    """
    result: list[Sampled] = []
    for i in range(len(draft.tokens) + 1):
        mask = None if masks is None else masks[i]
        if i == len(draft.tokens) or draft.probabilities is None:
            result.append(sampler.sample(logits[i], mask))
        else:
            token = _accepted_or_other(sampler, logits[i], mask, draft.tokens[i], draft.probabilities[i])
            result.append(sampler.choose(token, logits[i]))
        if i < len(draft.tokens) and result[-1].token != draft.tokens[i]:
            break
    return result


def _accepted_or_other(sampler: TokenSampler, logits: Array, mask: np.ndarray | None, token: int, q: np.ndarray) -> int:
    """A token drawn from q, float32 (V,), if it is accepted, or else one from what p has more than q."""
    p = sampler.distribution(logits, mask)
    if sampler.random() * float(q[token]) < p.probability(token):
        return token
    excess = np.maximum(p.probabilities - q[p.ids], 0)
    total = excess.sum()
    # None is left where p is q, up to rounding: then p itself.
    rest = Candidates(p.ids, excess / total) if total > 0 else p
    return draw(rest, sampler.random())
