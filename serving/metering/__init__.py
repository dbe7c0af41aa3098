"""What every request used and what it cost."""
