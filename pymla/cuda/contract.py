"""The checks of a GPU's operations (`pymla.contract`). Values of indices are on the device: they are not looked at."""

from pymla.contract import FLOAT16, Contract

check = Contract(expanded_floats=FLOAT16)
