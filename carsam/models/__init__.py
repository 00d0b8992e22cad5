"""Kinds of models: the contract of a family, one folder for each, and where models come from."""
