"""Architecture names that can be served."""

from __future__ import annotations

from tandem.engine.model import gemma2, gemma3, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3
from tandem.engine.model.family import Family
from tandem.engine.model.fields import Fields
from tandem.errors import CheckpointError

FAMILIES = {
    family.architecture: family
    for family in (
        llama.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        mistral.FAMILY,
        mistral.MINISTRAL_FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        gemma3.MULTIMODAL_FAMILY,
        phi3.FAMILY,
        olmo2.FAMILY,
        granite.FAMILY,
        smollm3.FAMILY,
    )
}


def family_of(fields: Fields) -> Family:
    """The family that `architectures` names. Raises CheckpointError listing the supported ones."""
    names = fields.raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(f"{fields.where}: architectures is {names!r}; a list of one name is needed")
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    served = ", ".join(FAMILIES)
    raise CheckpointError(f"{fields.where}: architecture {names[0]} is not supported; supported are {served}")
