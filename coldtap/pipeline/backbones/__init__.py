"""Frozen models: loaded, tapped, in floats or in integers."""
