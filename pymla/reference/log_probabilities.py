"""Log-probabilities of rows of logits: NumPy's definition, in float64, of `pymla.cpu.log_probabilities`.

Records are rows of log-probabilities as files have them (`pymla.files.kl_base`).
"""

import numpy as np

from pymla.files.kl_base import LEAST_SCALE, RANGE


def log_sum_exp(logits: np.ndarray, out: np.ndarray) -> np.ndarray:
    """``out[t] = ln Σ_i exp(logits[t, i])``: what a logit is above its log-probability.

    Parameters
    ----------
    logits : float array (T, V)
    out : float64 array (T,)
        NaN where a logit is NaN or plus infinity.
    """
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest = logits.max(-1)
        out[...] = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
    return out


def encode(logits: np.ndarray, log_sums: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Rows of logits as records.

    Parameters
    ----------
    logits : float array (T, V)
    log_sums : float64 array (T,)
        From `log_sum_exp`.
    out : uint16 array (T, ``kl_base.record_words(V)``)
    """
    columns = logits.shape[1]
    logits = logits.astype(np.float64)
    largest = logits.max(-1)
    least = np.maximum(logits.min(-1), largest - RANGE)
    heads = np.stack([(largest - least) / 65535, least - log_sums], axis=1).astype(np.float32)
    heads[heads[:, 0] < LEAST_SCALE, 0] = 0
    scale = heads[:, :1].astype(np.float64)
    above = np.maximum(logits - least[:, None], 0)
    out[...] = 0
    out[:, :4] = heads.view(np.uint16)
    out[:, 4 : 4 + columns] = np.rint(np.divide(above, scale, out=np.zeros_like(above), where=scale > 0))
    return out


def decode(records: np.ndarray, vocab_size: int) -> np.ndarray:
    """The log-probabilities of records, float64 (T, V).

    Parameters
    ----------
    records : uint16 array (T, ``kl_base.record_words(V)``)
    """
    heads = np.ascontiguousarray(records[:, :4]).view(np.float32).astype(np.float64)
    return heads[:, :1] * records[:, 4 : 4 + vocab_size] + heads[:, 1:]


def divergence(
    logits: np.ndarray, log_sums: np.ndarray, records: np.ndarray, out: np.ndarray, same_top: np.ndarray
) -> np.ndarray:
    """The Kullback-Leibler divergence of each row of logits from a base, ``out[t] = Σ_i p_i * (ln p_i - ln q_i)`` over
    the tokens whose p, the base's probability, is above ``exp(-16)``; and whether both have the same likeliest token.

    Parameters
    ----------
    logits : float array (T, V)
        Of q.
    log_sums : float64 array (T,)
        From `log_sum_exp`.
    records : uint16 array (T, ``kl_base.record_words(V)``)
        Of p.
    out : float64 array (T,)
        In nats.
    same_top : int32 array (T,)
        Out: 1 where the likeliest token is the same, 0 elsewhere; of equally likely ones the first counts.
    """
    base = decode(records, logits.shape[1])
    gap = base - (logits.astype(np.float64) - log_sums[:, None])
    out[...] = np.where(base > -RANGE, np.exp(base) * gap, 0).sum(-1)
    same_top[...] = logits.argmax(-1) == records[:, 4 : 4 + logits.shape[1]].argmax(-1)
    return out
