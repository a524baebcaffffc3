"""Writing a store, whatever its features come from."""
