"""The verbs of the `headrace` command, one module a group."""
