"""SimCLR (Chen et al. 2020) with the fused NT-Xent loss."""
