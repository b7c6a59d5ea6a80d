"""Products of quantised matrices with few vectors (`gemv`) and with many (`gemm`)."""
