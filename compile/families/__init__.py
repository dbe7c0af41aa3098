"""Model families: each recognises a checkpoint, states its facts and emits its graph."""
