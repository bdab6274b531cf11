"""A run: its options, its parts, its loop and what it leaves behind."""
