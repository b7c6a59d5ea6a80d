"""The checks of NumPy's operations (`pymla.contract`)."""

from pymla.contract import FLOATS, Contract

check = Contract(FLOATS, contiguous=False, known=lambda: True)
