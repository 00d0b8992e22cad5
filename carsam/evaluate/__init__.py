"""Scores of masks against a ground truth: boxes (AP, mean IoU), clicks, their intervals, finished images on disk."""
