"""What a network wants of its input: how colours are normalised, and which sizes it takes."""

import dataclasses

from models.networks.spec import BackboneSpec
from models.networks.wavelets import SIZE_STEP


def own_normalization(spec: BackboneSpec) -> BackboneSpec:
    """The spec with the normalisation that its network was trained with; untrained ones keep ImageNet's."""
    if spec.weights in ("demo", "random"):
        return spec
    from models.networks import libraries

    mean, std = libraries.normalization(spec.name)
    return dataclasses.replace(spec, mean=mean, std=std)


def size_step(spec: BackboneSpec) -> int:
    """Input sizes must be multiples of this: a ViT's patch, else the 8 pixels between places of a stride-8 map."""
    if spec.weights == "demo":
        return SIZE_STEP
    from models.networks import libraries

    return libraries.patch_side(spec.name) or 8
