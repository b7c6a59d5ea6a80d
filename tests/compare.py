"""Comparison of results that differ by rounding."""

import numpy as np


def relative_error(actual, expected) -> float:
    """Largest difference as a share of the largest expected magnitude."""
    difference = np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    return float(difference.max() / np.abs(expected).max())


def assert_close(actual, expected, *, rtol_max: float, reason: str):
    """Fail where ``max|actual - expected| / max|expected|`` reaches `rtol_max`, showing the worst element.

    Parameters
    ----------
    actual, expected : arrays of one shape; a NaN in either fails
    rtol_max : float
    reason : why this tolerance: which rounding it allows for
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if actual.size == 0:
        return
    difference = np.abs(actual - expected)
    worst = np.unravel_index(difference.argmax(), difference.shape)  # argmax finds a NaN first
    largest = np.abs(expected).max()
    error = difference[worst] / largest if largest else difference[worst]
    norms = np.linalg.norm(actual) * np.linalg.norm(expected)
    cosine = (actual * expected).sum() / norms if norms else 1.0
    print(f"relative error {error:.2e} (allowed {rtol_max:.0e}: {reason}), 1 - cosine {1 - cosine:.1e}")
    assert error < rtol_max, (
        f"relative error {error:.3e} is not below {rtol_max:.0e} ({reason}); worst at {tuple(map(int, worst))}: "
        f"{actual[worst]!r}, expected {expected[worst]!r}; cosine {cosine:.9f}"
    )
