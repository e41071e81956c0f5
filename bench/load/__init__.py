"""What clients see of a server under load."""
