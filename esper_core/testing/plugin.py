"""The pytest plugin that comes with Esper: the option by which conformance classes choose their cases."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--conformance`."""
    parser.getgroup("esper").addoption(
        "--conformance",
        choices=("fast", "all"),
        default="fast",
        help="cases of the conformance classes: a representative subset, or all",
    )
