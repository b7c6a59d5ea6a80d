"""The machine that the program runs on: cores, memory, and the files of compiled kernels."""
