"""Files for other tools: a packed (or float) model as ONNX, its quantized layers in integers.

``export.py`` tells the story: the family gives a model in two halves, ``trace.py`` traces them with marks in the places
of quantized sites, ``layers.py`` and ``attention.py`` fill the marks in, and a profile puts around the two graphs what
its tool expects.
"""
