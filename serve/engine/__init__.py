"""The engine: the part of the server that touches a device."""
