"""Which keys of callers were used, for what, and what was answered."""
