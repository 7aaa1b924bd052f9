"""How many paired seeds a claim needs. Imports nothing."""

from __future__ import annotations

from typing import Final

FEWEST: Final = 3
"""Paired seeds below which no interval is given: with two, Student's t stretches it by a factor of 12.7."""

TOO_FEW: Final = f"needs {FEWEST} seeds"
"""What stands in place of an interval over fewer."""

NOT_SHOWN: Final = "growing is not shown to pay here"
"""How a verdict begins whose interval holds zero."""
