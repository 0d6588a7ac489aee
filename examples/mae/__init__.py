"""Masked autoencoder on real images, with sslfast's masking operations beside plain PyTorch."""
