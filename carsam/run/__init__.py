"""A run: the walk over a model's units, those kept on disk, how far it is, measurements and comparisons."""
