"""The engine service that gateways know, `vllm.grpc.engine.VllmEngine`, in front of the same `Service`.

A gateway such as SMG speaks OpenAI's HTTP API to its clients and this to its engines: token ids in, token ids
out. Its messages are from the package smg-grpc-proto, which is imported only where a gateway is asked for.
"""
