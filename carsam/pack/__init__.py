"""The packed folder: integers, scales and recipe as files, and the model that they give back."""
