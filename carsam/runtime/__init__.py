"""Integers that run: quantized layers computed on their integer codes instead of simulated in floating point."""
