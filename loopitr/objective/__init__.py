"""One training step: encode, gather, mine, score, and the losses on the scores."""
