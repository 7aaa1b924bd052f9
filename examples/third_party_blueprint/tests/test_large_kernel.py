"""Everything that Esper asks of a blueprint."""

from esper_core.testing import BlueprintConformance


class TestLargeKernel(BlueprintConformance):
    spec = "large_kernel"
