"""Frozen networks. Here is what a command line needs to know of them, without importing anything."""

DEMO_NETWORK = "wavelet_pyramid"  # the bundled one
IMAGENET_NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")  # --weights imagenet
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
MAX_SIDE = 4096  # pixels of a square input
