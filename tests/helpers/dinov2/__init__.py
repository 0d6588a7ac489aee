"""A stand-in for facebookresearch/dinov2: the names, arguments and formulas of its losses, in plain PyTorch."""
