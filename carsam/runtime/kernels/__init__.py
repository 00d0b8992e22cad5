"""Triton kernels; each module imports triton, so only what runs on a GPU (or in Triton's interpreter) imports them."""
