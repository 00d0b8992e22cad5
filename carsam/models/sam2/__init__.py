"""SAM 2 on images: Hiera, its feature pyramid, and the mask decoder with high-resolution features."""
