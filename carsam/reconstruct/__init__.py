"""Units of a model, and the optimiser that reconstructs them one by one."""
