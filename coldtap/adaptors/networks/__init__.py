"""The adaptors themselves, one a file, on one contract (`contract.py`), and the pieces that they share."""
