"""The fusion rules by name. A new one is a file with a subclass of `FusionRule`, and a line here."""

from utils.registry import Registry

RULES = Registry(
    {"paper": "models.fusion.paper:PaperProduct", "standardized": "models.fusion.standardized:Standardized"}
)
