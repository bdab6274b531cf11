"""The commands that use a trained model: each has options and one function, for `loopitr` and the recipes."""
