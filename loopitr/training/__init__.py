"""A training run: its options, its loop, its checkpoints and its results."""
