"""What bytes mean: the parts of the specification, one a file."""
