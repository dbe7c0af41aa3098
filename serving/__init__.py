"""The data plane: everything a request touches."""
