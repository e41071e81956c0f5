"""Pages of `docs/` that are made from the code. `make pages` writes them, and a test notices stale ones."""
