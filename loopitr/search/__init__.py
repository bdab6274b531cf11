"""Using a trained model: encoding, comparing, scoring and ranking images and texts, and searching an index."""
