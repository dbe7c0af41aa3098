"""The step channel between frontends and replicas, and the directory of replicas."""
