"""Changes of a complete store that touch no feature."""
