"""Messages generated from protos/; committed, never edited."""
