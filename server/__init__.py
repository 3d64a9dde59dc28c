"""The engine behind gRPC, and the client."""
