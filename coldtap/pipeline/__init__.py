"""Images in, features out: sources, backbone, taps, gathers and the batch job."""
