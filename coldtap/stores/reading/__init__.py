"""Reading a store: rows of features, and the tables beside them."""
