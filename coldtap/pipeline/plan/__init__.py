"""What a job is to do, decided before an image is read."""
