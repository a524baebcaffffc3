"""Low-rank attention modules, and their backward pass in little memory."""
