"""Losses and scores of each kind of target."""
