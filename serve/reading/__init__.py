"""Reading messages: bytes of a stranger's in, requests and ids out. It never imports JAX.

It takes time and memory that the message decides about, so it runs where it can be stopped.
"""
