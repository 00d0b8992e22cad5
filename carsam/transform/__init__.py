"""What changes weights but not the function in floating point, so that they quantize better."""
