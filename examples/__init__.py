"""Whole uses of coldtap, each run in CI."""
