"""How a quantised backbone runs."""
