"""The family SAM: transformers' SamModel, and Meta's checkpoints of it."""
