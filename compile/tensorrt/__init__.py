"""TensorRT plans: the network, its build, and what can be proved of it without a GPU."""
