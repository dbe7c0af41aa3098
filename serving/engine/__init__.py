"""Engines and the loop that steps them; no network, no Ray, no money."""
