"""What the host takes for a step."""
