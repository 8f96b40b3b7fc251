"""The model in PyTorch, one file per module; parameter names equal those of the official checkpoints."""
