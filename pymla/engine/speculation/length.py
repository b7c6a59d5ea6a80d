"""How many tokens to draft: adapted to the tokens that were accepted and to what steps cost.

Costs are in *plain tokens*: the time that a step without a draft takes for one token. A draft of n tokens costs c(n)
plain tokens more than no draft: those of drafting, and of a longer step. It is worth that if it brings more than c(n)
accepted tokens.

**How long.** If each token is accepted with probability a, as long as those before it were, a draft of n tokens brings
``a + a² + … + aⁿ`` on average (Leviathan et al. 2023, equation 1, without the token that comes anyway). a is estimated
from the last drafts. The length with the most tokens per time is taken, and none where no length beats a plain step.

**Never slower.** Acceptance may be estimated wrongly, change from one token to the next, or differ from position to
position. So accounts are kept of what happened. Speculation is *on* in periods. In each, a running loss grows with the
cost of each draft and shrinks with its accepted tokens, but not below 0. When it exceeds `LIMIT` plain tokens, or when
no length seems worth it, the period ends. What a period lost as a whole is a debt, and each plain token while
speculation is off pays `ALLOWANCE` plain tokens of it. The next period begins when the debt is paid.

The loss of a period is at most its running loss at its end, which is at most ``LIMIT`` and the cost of one draft, C.
Since debts are paid before the next period, at any time::

    time with speculation <= time without * (1 + ALLOWANCE) + LIMIT + C

in plain tokens, for any drafter and any text. Drafts of different kinds (`Drafter.kind`) have accounts of their own,
whose losses add up: with three kinds, as of prompt lookup, 3 % and some tokens. Costs are those of the steps that were
measured last (`pymla.engine.speculation.times`). What is done once is not in them: the first step of a model with so
many tokens, which is recorded, counts as the prior has it, and a draft model's reading of the prompt does not count.
"""

from collections.abc import Callable, Sequence

#: The share of the time without speculation that attempts may lose, with drafts of each kind.
ALLOWANCE = 1 / 96
#: Plain tokens that a period may lose before it ends. More would end fewer periods by chance.
LIMIT = 2.0
#: By what share of its time a draft has to gain, to be worth it.
MARGIN = 0.02
#: The acceptance that a period begins with, and as how many tokens this guess counts. A good one, as it is tried only
#: where it would be worth it; the first drafts correct it.
GUESS, GUESS_WEIGHT = 0.85, 2.0
#: What a draft counts in relation to the one after it.
FADING = 0.9


class DraftLength:
    """The length of the next draft of one kind for a text.

    Parameters
    ----------
    most : int
        Tokens of the longest draft.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._is_on = False
        self._accepted, self._decided = 0.0, 0.0  # of the last drafts: tokens accepted, and tokens decided upon
        self._running_loss, self._loss, self._debt = 0.0, 0.0, 0.0

    @property
    def is_on(self) -> bool:
        """Whether drafts are worth it, or are being tried."""
        return self._is_on

    @property
    def acceptance(self) -> float:
        """The estimated probability that a drafted token is accepted if those before it are; of the last period, where
        speculation is off."""
        return self._accepted / self._decided if self._decided else GUESS

    def next(self, costs: Callable[[], Sequence[float]], texts: int = 1) -> int:
        """Tokens to draft; 0: none this time.

        Parameters
        ----------
        costs : callable()
            What a draft of 0, 1, …, `most` tokens costs, in plain tokens; not asked for while speculation is off.
        texts : int
            Texts that the step brings a token to, this one included: they all wait for a draft.
        """
        if not self._is_on:
            if self._debt > 0:
                return 0
            self._begin()
        best = self._best(costs(), texts)
        if best == 0:
            self._end()
        return best

    def saw(self, drafted: int, accepted: int, cost: float) -> None:
        """Count a step of the text with a draft of this kind, or without a draft.

        Parameters
        ----------
        drafted, accepted : int
        cost : float
            Of the draft, in plain tokens; 0 for a step without one.
        """
        if not self._is_on:
            self._debt = max(0.0, self._debt - ALLOWANCE)
            return
        if drafted:
            self._accepted = FADING * self._accepted + accepted
            self._decided = FADING * self._decided + accepted + (accepted < drafted)
        self._loss += cost - accepted
        self._running_loss = max(0.0, self._running_loss + cost - accepted)
        if self._running_loss > LIMIT:
            self._end()

    def _begin(self) -> None:
        self._is_on = True
        self._accepted, self._decided = GUESS * GUESS_WEIGHT, GUESS_WEIGHT
        self._running_loss, self._loss = 0.0, 0.0

    def _end(self) -> None:
        self._is_on = False
        self._debt = max(0.0, self._loss)

    def _best(self, costs: Sequence[float], texts: int) -> int:
        """The length with the most tokens per time."""
        a = self.acceptance
        best, best_rate, brings, power = 0, 0.0, 0.0, 1.0
        for n in range(1, self.most + 1):
            power *= a
            brings += power
            rate = (texts + brings) / (texts + costs[n])
            if rate > best_rate and brings - costs[n] > MARGIN * (1 + costs[n]):
                best, best_rate = n, rate
        return best
