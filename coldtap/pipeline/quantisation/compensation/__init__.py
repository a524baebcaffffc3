"""What is added to a quantised model so that its features come near to the float ones: CWAC, QwT."""
