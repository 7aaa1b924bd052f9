"""The tags by which hosts, injection points and blueprints find each other."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

LAYOUTS: Final = ("NCHW", "NHWC", "NLD")
"""Feature layouts. NCHW and NHWC are maps (batch, channels, height, width), NLD sequences (batch, length, dim)."""

TAGS: Final = MappingProxyType(
    {
        "spatial": "features are maps with height and width (layout NCHW or NHWC)",
        "sequence": "features are sequences of tokens (layout NLD)",
        "causal": "position t must not see positions after t",
        "classification": "one label for each example",
        "language-modelling": "the next token for each position",
        "vision": "images",
        "language": "text",
        "signal": "one-dimensional signals",
        "pretrained": "can load weights trained elsewhere",
        "streaming": "data that need not fit into memory",
        "learned": "holds parameters of its own that train",
    }
)
"""Every tag that a spec may use, and what it promises. Plugins may add tags with an `x-` prefix."""

LAYOUT_TAGS: Final = MappingProxyType({"NCHW": "spatial", "NHWC": "spatial", "NLD": "sequence"})
"""The tag that a layout implies."""


def is_tag(tag: str) -> bool:
    """Whether `tag` is known or a plugin's own (`x-…`)."""
    return tag in TAGS or tag.startswith("x-")
