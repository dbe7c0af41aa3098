"""gRPC in, gRPC out."""
