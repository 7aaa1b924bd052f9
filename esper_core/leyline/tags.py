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
"""Every tag of a point or part, and what it promises. Plugins may add tags with an `x-` prefix."""

TASK_TAGS: Final = MappingProxyType(
    {
        "regression": "numbers for each example",
        "multilabel": "any number of labels for each example",
        "segmentation": "one label for each position",
        "masked-language": "the tokens that were masked",
    }
)
"""Further kinds of tasks. They are no features of a controller, so its files do not depend on them."""

AROUND_TAGS: Final = MappingProxyType(
    {
        "around": "the point stands around one layer: a seed sees the layer's input and adds to its output",
        "around-linear": "that layer is linear",
        "around-conv": "that layer is a convolution",
        "around-embedding": "that layer is an embedding",
    }
)
"""Tags of points around layers, and of blueprints that can grow there. They are no features of a controller."""

REWARD_TAGS: Final = MappingProxyType({"removal": "a term that is 0 unless an overseer measures removals"})
"""Tags of rewards. They are no features of a controller."""

LAYOUT_TAGS: Final = MappingProxyType({"NCHW": "spatial", "NHWC": "spatial", "NLD": "sequence"})
"""The tag that a layout implies."""


def is_tag(tag: str) -> bool:
    """Whether `tag` is known or a plugin's own (`x-…`)."""
    return tag in TAGS or tag in TASK_TAGS or tag in AROUND_TAGS or tag in REWARD_TAGS or tag.startswith("x-")
