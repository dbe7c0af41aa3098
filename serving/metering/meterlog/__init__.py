"""The meter log: append-only, checksummed, fsynced; what everything else about usage follows."""
