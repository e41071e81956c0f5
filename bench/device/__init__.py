"""What a device takes: kernels, steps, start-up."""
