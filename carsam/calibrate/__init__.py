"""What calibration images tell: observed ranges, and cached activations."""
