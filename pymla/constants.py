"""Numbers of mathematics that several backends compute with."""

import math

#: Logarithm of e to base 2. Kernels take exponentials to base 2, which cost half as much: ``exp(x) = 2 ** (x * LOG2E)``.
LOG2E = math.log2(math.e)
