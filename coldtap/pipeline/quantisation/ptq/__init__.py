"""A float model into integers: ranges, codes, and the two models side by side."""
