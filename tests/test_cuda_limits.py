"""What measures the device's limits, as far as the simulator goes: the products that the rate counts are computed."""

import numpy as np
import simulated  # noqa: F401

from pymla.cuda import limits, memory


def test_products_are_computed():
    times, out = 3, memory.empty(64, np.int32)
    limits._multiply[2, 32](times, out)
    lanes = np.arange(32)
    # Words of 0 to 38 have one byte that is not 0: the product of row g and column c is the sum over t of two equal
    # parts of k, where a lane's number is 4 g + t.
    a, t = lanes.reshape(8, 4), np.arange(4)
    expected = np.zeros(32, np.int64)
    for lane in lanes:
        g, column = lane >> 2, 2 * (lane & 3)
        expected[lane] = sum(2 * (a[g, t] * (a[column, t] + n)).sum() for n in range(8))
    np.testing.assert_array_equal(memory.to_host(out), np.tile(times * expected, 2))


def test_limits_are_measured():
    found = limits.measure()
    assert found.read > 0
    assert found.int8 > 0
    assert len(limits.seconds(lambda: None, 3)) == 3
