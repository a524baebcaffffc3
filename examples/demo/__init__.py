"""The demo: digits to trained adaptors, with one table and one picture."""
