"""A stand-in for facebookresearch/dinov3: the names, arguments and formulas of its losses, in plain PyTorch."""
