"""The control plane and the `headrace` command."""
