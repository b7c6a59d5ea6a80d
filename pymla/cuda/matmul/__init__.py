"""Products of matrices with few vectors (gemv) and with many (gemm), as kernels made for a type."""
