"""Registers the blueprint. Import-light: the factory is named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec


@hookimpl
def esper_blueprints() -> list[BlueprintSpec]:
    """The one blueprint of this package."""
    return [
        BlueprintSpec(
            name="large_kernel",
            summary="channels weighed by a wide neighbourhood: depthwise, dilated depthwise, pointwise",
            family="attention",
            layouts=("NCHW",),
            needs={"spatial"},
            capabilities={"learned"},
            sensors=("gradient_norm", "update_ratio", "delta_norm", "proxy_loss"),
            options=(Option("dilation", "int", 3, "of the second depthwise convolution", minimum=1, maximum=8),),
            factory="esper_large_kernel.large_kernel:LargeKernel",
            estimate="esper_large_kernel.large_kernel:estimate",
            source="Guo et al., Visual Attention Network, 2022, arXiv:2202.09741, section 3.1",
        )
    ]
