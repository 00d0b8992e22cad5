"""What a model costs here: files, memory and time of a float model, of what others make of it, and of ours."""
