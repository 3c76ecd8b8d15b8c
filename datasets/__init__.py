"""Frames and data sets. A data set that can be downloaded is a file with a function, and a line in DOWNLOADS."""

from utils.registry import Registry

DOWNLOADS = Registry({"coal_ad": "datasets.coalad:ensure_coalad"})  # each takes the folder of all categories
MAX_BATCH = 1 << 16  # images at a time
MAX_MEGAPIXELS = 90.0  # of an image file, unless the user says otherwise: 270 MB as RGB
