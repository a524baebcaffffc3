"""A store in another tier or layout, without the backbone."""
