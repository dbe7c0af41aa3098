"""Which replica gets the request."""
