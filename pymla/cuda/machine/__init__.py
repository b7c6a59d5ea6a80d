"""Instructions of the GPU as functions, and the simulator that runs kernels as Python."""
