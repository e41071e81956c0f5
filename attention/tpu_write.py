"""Placeholder until the kernel lands."""


def write(*a, **k):
    raise NotImplementedError
