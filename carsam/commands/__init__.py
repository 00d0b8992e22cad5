"""The command line, one module a command: the module ``quantize`` holds the function ``quantize``.

Modules here import torch and transformers inside their functions only, so that ``carsam --help`` answers at once.
"""
