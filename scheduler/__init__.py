"""Which tokens the next step computes. Standard library only: no JAX, no NumPy, no gRPC, no clock."""
