"""Image files: which there are, reading them, and the way from pixels to a model's input."""
