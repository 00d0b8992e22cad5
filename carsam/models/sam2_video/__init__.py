"""SAM 2 on videos: the image model with its memory."""
