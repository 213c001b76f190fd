"""Reference ResNet+ViT hybrids: ``resvit_model("embed-nano")``. Importing this needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resvit_export.models.config import HybridConfig
from resvit_export.models.overrides import with_overrides
from resvit_export.models.presets import preset

if TYPE_CHECKING:
    from resvit_export.models.hybrid import Hybrid


def resvit_config(name: str, /, **overrides: Any) -> HybridConfig:
    """The config of a reference hybrid with some fields replaced; see ``with_overrides``."""
    return with_overrides(preset(name), overrides)


def resvit_model(name: str, /, **overrides: Any) -> Hybrid:
    """Build a reference hybrid with fresh weights; its ``config`` says how images must be preprocessed.

    ``name`` is one of ``MODEL_NAMES``; ``overrides`` are fields of ``HybridConfig``, such as ``num_classes``.
    Raises ``ResvitError`` for an unknown name or override, and for sizes that do not fit together.
    """
    from resvit_export.models.hybrid import hybrid_from_config

    return hybrid_from_config(resvit_config(name, **overrides))
