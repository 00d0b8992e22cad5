"""Files of a user: images, COCO annotations, and the arithmetic of boxes."""
