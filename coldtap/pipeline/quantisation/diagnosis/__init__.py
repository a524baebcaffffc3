"""What quantisation takes from a backbone, and what compensation gives back."""
