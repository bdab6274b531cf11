"""One training step: encode, gather, mine, score, and the losses of all that."""
