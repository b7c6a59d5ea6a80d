"""The checks of the processor's operations (`pymla.contract`)."""

from pymla.contract import Contract
from pymla.cpu.cache_types import ROW_BYTES
from pymla.cpu.runtime import threads

check = Contract(known=lambda: not threads.recording(), pages=ROW_BYTES)
