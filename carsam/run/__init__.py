"""What a run needs around its work: the place it writes to, its lock, what it keeps, its stages, its signals."""
