"""What a TPU takes, from what its compiler says: no TPU is needed."""
