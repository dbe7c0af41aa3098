"""Artifacts on a folder or an S3-compatible store that several homes share."""
