"""Pixels to the features of one block."""
