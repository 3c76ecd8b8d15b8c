"""Frozen networks. What a command line needs to know of them stands here, where nothing is imported."""

DEMO_NETWORK = "wavelet_pyramid"  # the one that ships
MAX_SIDE = 4096  # pixels of a square input
