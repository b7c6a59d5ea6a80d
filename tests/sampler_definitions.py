"""Samplers by their definitions, one token at a time in Python's floats: what tests compare `pymla.text.sampling` with.

Tokens that are left are a dict of logits by token. Names are those of `SamplingParams`, p are parameters.
"""

import itertools
import math


def ordered(logits):
    """Tokens, the likeliest first, of equal ones the lower."""
    return sorted(logits, key=lambda token: (-logits[token], token))


def softmax(logits):
    highest = max(logits.values())
    weights = {token: math.exp(x - highest) for token, x in logits.items()}
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def surprises(logits):
    """-log p of every token."""
    highest = max(logits.values())
    log_total = math.log(math.fsum(math.exp(x - highest) for x in logits.values()))
    return {token: log_total - (x - highest) for token, x in logits.items()}


def entropy(logits):
    return math.fsum(math.exp(-surprise) * surprise for surprise in surprises(logits).values())


def some(logits, tokens):
    return {token: logits[token] for token in tokens}


def at_least(logits, count, p):
    """The `count` likeliest tokens, or `min_keep` of them."""
    return some(logits, ordered(logits)[: max(count, p.min_keep)])


def penalties(logits, p, text):
    window = text[-p.penalty_window :]
    new = dict(logits)
    for token in set(window) & set(logits):
        x = logits[token]
        x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        new[token] = x - window.count(token) * p.frequency_penalty - p.presence_penalty
    return new


def tokens_after_the_last_breaker(window, breakers):
    for start in range(len(window) - 1, -1, -1):
        found = [len(each) for each in breakers if tuple(window[start : start + len(each)]) == each]
        if found:
            return len(window) - start - max(found)
    return len(window)


def dry(logits, p, text, breakers):
    if not p.dry_multiplier:
        return logits
    window = text[-p.dry_window :]
    limit = tokens_after_the_last_breaker(window, breakers)
    new = dict(logits)
    for token in logits:
        longest = -1
        for at in range(len(window)):
            if window[at] == token and (token,) not in breakers:
                # The tokens before it that are the last ones of the text.
                n = 0
                while n < min(at, limit) and window[at - n - 1] == window[-n - 1]:
                    n += 1
                longest = max(longest, n)
        if longest >= p.dry_allowed_length and len(window) > p.dry_allowed_length:
            new[token] -= p.dry_multiplier * p.dry_base ** (longest - p.dry_allowed_length)
    return new


def top_n_sigma(logits, p):
    if p.top_n_sigma <= 0:
        return logits
    mean = math.fsum(logits.values()) / len(logits)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logits.values()) / len(logits))
    lowest = max(logits.values()) - p.top_n_sigma * deviation
    return {token: x for token, x in logits.items() if x >= lowest}


def top_k(logits, p):
    return some(logits, ordered(logits)[: p.top_k or None])


def fewest(logits, order, enough, p):
    """The first tokens of an order that have enough together, or `min_keep`."""
    shares, total, kept = softmax(logits), 0.0, []
    for token in order:
        if enough(total) and len(kept) >= max(p.min_keep, 1):
            break
        kept.append(token)
        total += shares[token]
    return some(logits, kept)


def typ_p(logits, p):
    if p.typical_p == 1:
        return logits
    surprise, mean = surprises(logits), entropy(logits)
    order = sorted(logits, key=lambda token: (abs(surprise[token] - mean), token))
    return fewest(logits, order, lambda total: total > p.typical_p, p)


def top_p(logits, p):
    return logits if p.top_p == 1 else fewest(logits, ordered(logits), lambda total: total >= p.top_p, p)


def min_p(logits, p):
    shares = softmax(logits)
    return at_least(logits, sum(share >= p.min_p * max(shares.values()) for share in shares.values()), p)


def xtc(logits, p, coin):
    if coin >= p.xtc_probability or p.xtc_threshold > 0.5:
        return logits
    shares = softmax(logits)
    top = [token for token in ordered(logits) if shares[token] >= p.xtc_threshold]
    if len(logits) - len(top) + 1 < p.min_keep:
        return logits
    return some(logits, set(logits) - set(top[:-1]))


def temperature(logits, p):
    value = p.temperature
    if p.dynatemp_range and len(logits) > 1:
        low, high = max(0, value - p.dynatemp_range), value + p.dynatemp_range
        value = low + (high - low) * (entropy(logits) / math.log(len(logits))) ** p.dynatemp_exponent
    if value == 0:
        return some(logits, ordered(logits)[:1])
    return {token: x / value for token, x in logits.items()}


def mirostat(logits, mu):
    """Version 1: the estimated exponent of Zipf's law of the likeliest 100, and the rank with the surprise μ."""
    order, count = ordered(logits)[:100], len(logits)
    if len(order) == 1:
        return logits
    t = [math.log((i + 2) / (i + 1)) for i in range(len(order) - 1)]
    b = [logits[one] - logits[other] for one, other in itertools.pairwise(order)]
    s = sum(x * y for x, y in zip(t, b, strict=True)) / sum(x * x for x in t)
    epsilon = s - 1
    k = (epsilon * 2**mu / (1 - count**-epsilon)) ** (1 / s)
    return some(logits, ordered(logits)[: max(1, math.floor(k))])


def mirostat_v2(logits, mu):
    kept = [token for token, surprise in surprises(logits).items() if surprise / math.log(2) <= mu]
    return some(logits, kept or ordered(logits)[:1])


def adaptive_p(logits, target):
    new = {}
    for token, share in softmax(logits).items():
        distance = abs(share - target) / 0.3
        new[token] = 5 - 10 * distance**2 / (1 + distance)
    return new


def distribution(logits, p, *, text=(), coin=1.0, breakers=(), banned=()):
    """Pairs of a token and its probability after the samplers of `p.samplers`, the likeliest first.

    Parameters: logits, a list; p, a `SamplingParams` without Mirostat and adaptive-p; the text so far; XTC's random
    number; DRY's breakers, tuples of tokens; tokens that a mask bans.
    """
    left = {token: x + p.logit_bias.get(token, 0) for token, x in enumerate(logits)}
    left = {token: x for token, x in left.items() if x > -math.inf and token not in banned}
    steps = {
        "penalties": lambda each: penalties(each, p, list(text)),
        "dry": lambda each: dry(each, p, list(text), breakers),
        "top_n_sigma": lambda each: top_n_sigma(each, p),
        "top_k": lambda each: top_k(each, p),
        "typ_p": lambda each: typ_p(each, p),
        "top_p": lambda each: top_p(each, p),
        "min_p": lambda each: min_p(each, p),
        "xtc": lambda each: xtc(each, p, coin),
        "temperature": lambda each: temperature(each, p),
    }
    for name in p.samplers:
        left = steps[name](left)
    shares = softmax(left)
    return [(token, shares[token]) for token in ordered(left)]
