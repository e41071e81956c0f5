"""The server: calls in, requests to the engine, events out. It never imports JAX."""
