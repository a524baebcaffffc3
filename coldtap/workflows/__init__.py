"""What needs the pipeline and the adaptors at once."""
