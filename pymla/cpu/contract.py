"""The checks of the processor's operations (`pymla.contract`)."""

from pymla.contract import Contract
from pymla.cpu import threads
from pymla.cpu.cache_rows import ROW_BYTES

check = Contract(known=lambda: not threads.recording(), pages=ROW_BYTES)
