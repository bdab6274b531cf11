"""Options or a folder -> a model and its processor."""
