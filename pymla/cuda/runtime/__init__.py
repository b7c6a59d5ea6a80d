"""Compiling kernels and launching them by the driver, and the simulator that runs them as Python."""
