"""Adaptors on datasets, from images to one table."""
