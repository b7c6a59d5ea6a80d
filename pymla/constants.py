"""Numbers of mathematics that several backends compute with."""

import math

#: Logarithm of e to base 2: ``exp(x) = 2 ** (x * LOG2E)``. Exponentials to base 2 cost half as much as those to base e.
LOG2E = math.log2(math.e)
