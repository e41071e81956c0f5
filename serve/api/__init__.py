"""What crosses the wire: the protos, their stubs, and errors."""
