"""The processor's registers and instructions, as Numba values."""
