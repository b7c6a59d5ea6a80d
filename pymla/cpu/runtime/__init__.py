"""Compiling kernels, their arguments, and the threads that run them."""
