"""The metrics by name. A new one is a file with a subclass of `Metric`, and a line here."""

from utils.registry import Registry

METRICS = Registry({"image": "metrics.image:ImageMetrics", "pixel": "metrics.pixel:PixelMetrics"})


def protocols() -> dict[str, str]:
    """Every figure, in the order of metrics.json, and how it is defined."""
    return {figure: text for metric in METRICS.values() for figure, text in metric.protocols.items()}
