"""The invariants of every kind of adapter that ships."""

from esper_core.testing import AdapterConformance


class TestLora(AdapterConformance):
    spec = "lora"
    options = {"share": 0.5}
