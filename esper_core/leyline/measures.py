"""How the need of a layer for low-rank seeds is measured; see `kasmina.allocation`."""

from __future__ import annotations

from typing import Final

MEASURES: Final = ("need", "gradient", "activation", "random", "uniform")
"""need: Σ|W⊙∇W|, which ranks weights for pruning (Molchanov et al. 2019, arXiv:1906.10771); gradient: ‖∇W‖; activation:
variance of the layer's input along each principal component (EVA: Paischer et al. 2024, arXiv:2410.07170); random and
uniform are controls."""
