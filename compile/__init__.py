"""The build plane: checkpoint in, engine artifact out."""
