"""Work that outlives a connection."""
