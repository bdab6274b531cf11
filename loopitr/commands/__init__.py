"""What the recipes that use a trained model do: each its options and one function."""
