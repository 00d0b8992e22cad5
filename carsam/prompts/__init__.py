"""An image with its box prompts, as calibration, diagnosis and evaluation each choose them."""
