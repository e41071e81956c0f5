"""The server: what joins the scheduler to the device, and both to clients over gRPC."""
