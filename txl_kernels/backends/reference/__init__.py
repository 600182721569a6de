"""Plain, differentiable PyTorch for every op on any device: the specification of each."""
