"""The real scheduler under a virtual clock."""
