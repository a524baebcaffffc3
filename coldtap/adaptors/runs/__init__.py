"""The folder that a training leaves: written, read, exported."""
