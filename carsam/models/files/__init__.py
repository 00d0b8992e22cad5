"""Files and places that hold models: checkpoints, folders, the Hub."""
