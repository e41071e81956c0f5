"""The engine in a process of its own, behind the same door."""
