"""The kernels of `pymla.cpu.moe`: choosing experts, and their products with few tokens (gemv) and with many (gemm)."""
