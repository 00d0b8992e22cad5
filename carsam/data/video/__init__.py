"""Videos as folders of frames, their masks, and data sets of them (DAVIS, SA-V)."""
