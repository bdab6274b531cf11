"""Builds or loads a model and its processor, from options or from a folder."""
