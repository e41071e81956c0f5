"""Checks on the device at hand: they pass or fail, and measure nothing."""
