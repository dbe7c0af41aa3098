"""Values that cross boundaries; standard library only."""
