"""Public stand-ins: real small implementations of our protocols, for tests."""
