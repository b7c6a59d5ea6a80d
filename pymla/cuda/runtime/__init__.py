"""Compiling kernels and launching them by the driver."""
