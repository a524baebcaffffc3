"""Quantised backbones: integer weights and activations, compensation, and kernels that run them."""
