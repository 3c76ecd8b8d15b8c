"""Frozen networks. Here is what a command line needs to know of them, without importing anything."""

DEMO_NETWORK = "wavelet_pyramid"  # the bundled one
MAX_SIDE = 4096  # pixels of a square input
