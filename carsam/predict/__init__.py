"""What ``carsam predict`` does: inputs, prompts, masks, outputs."""
