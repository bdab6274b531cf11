"""A trained model -> what others load."""
