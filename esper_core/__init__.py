"""Esper grows neural networks while they train.

The names in `PUBLIC` can be imported from here; each is imported only when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper_core.integrations.lightning import LightningGrowth as LightningGrowth
    from esper_core.integrations.lightning import load_grown as load_grown
    from esper_core.integrations.transformers import GrowthCallback as GrowthCallback
    from esper_core.kasmina.calls import Call as Call
    from esper_core.kasmina.compose import compose as compose
    from esper_core.kasmina.copies import BlockRun as BlockRun
    from esper_core.kasmina.copies import CopiedRun as CopiedRun
    from esper_core.kasmina.fold import Fold as Fold
    from esper_core.kasmina.module_host import ModuleHost as ModuleHost
    from esper_core.kasmina.module_host import host_from_module as host_from_module
    from esper_core.kasmina.plane import Plane as Plane
    from esper_core.kasmina.sight import Sight as Sight
    from esper_core.kasmina.sight import sight_of as sight_of
    from esper_core.leyline.errors import EsperError as EsperError
    from esper_core.registry import Registry as Registry
    from esper_core.registry import load_registry as load_registry
    from esper_core.registry import split_reference as split_reference
    from esper_core.tamiyo.adapter import Adapter as Adapter
    from esper_core.tamiyo.core import TamiyoCore as TamiyoCore
    from esper_core.tolaria.config import RunConfig as RunConfig
    from esper_core.tolaria.ema import GrowthEMA as GrowthEMA
    from esper_core.tolaria.grow import accompany as accompany
    from esper_core.tolaria.grow import grow as grow
    from esper_core.tolaria.hub_folder import from_pretrained as from_pretrained
    from esper_core.tolaria.hub_folder import save_pretrained as save_pretrained
    from esper_core.tolaria.labels import to_batch as to_batch
    from esper_core.tolaria.model_file import load_growth as load_growth
    from esper_core.tolaria.model_file import load_model as load_model
    from esper_core.tolaria.model_file import save_growth as save_growth
    from esper_core.tolaria.progress_file import Progress as Progress
    from esper_core.tolaria.progress_file import resume as resume
    from esper_core.tolaria.progress_file import save_progress as save_progress
    from esper_core.tolaria.run import resume_run as resume_run
    from esper_core.tolaria.run import start_run as start_run
    from esper_core.tolaria.session import Tolaria as Tolaria

__version__ = "0.2.0"

PUBLIC: dict[str, str] = {
    "Adapter": "esper_core.tamiyo.adapter:Adapter",
    "BlockRun": "esper_core.kasmina.copies:BlockRun",
    "Call": "esper_core.kasmina.calls:Call",
    "CopiedRun": "esper_core.kasmina.copies:CopiedRun",
    "EsperError": "esper_core.leyline.errors:EsperError",
    "Fold": "esper_core.kasmina.fold:Fold",
    "GrowthCallback": "esper_core.integrations.transformers:GrowthCallback",
    "GrowthEMA": "esper_core.tolaria.ema:GrowthEMA",
    "LightningGrowth": "esper_core.integrations.lightning:LightningGrowth",
    "ModuleHost": "esper_core.kasmina.module_host:ModuleHost",
    "Plane": "esper_core.kasmina.plane:Plane",
    "Progress": "esper_core.tolaria.progress_file:Progress",
    "Registry": "esper_core.registry:Registry",
    "RunConfig": "esper_core.tolaria.config:RunConfig",
    "TamiyoCore": "esper_core.tamiyo.core:TamiyoCore",
    "Sight": "esper_core.kasmina.sight:Sight",
    "Tolaria": "esper_core.tolaria.session:Tolaria",
    "accompany": "esper_core.tolaria.grow:accompany",
    "compose": "esper_core.kasmina.compose:compose",
    "from_pretrained": "esper_core.tolaria.hub_folder:from_pretrained",
    "grow": "esper_core.tolaria.grow:grow",
    "host_from_module": "esper_core.kasmina.module_host:host_from_module",
    "load_grown": "esper_core.integrations.lightning:load_grown",
    "load_growth": "esper_core.tolaria.model_file:load_growth",
    "load_model": "esper_core.tolaria.model_file:load_model",
    "load_registry": "esper_core.registry:load_registry",
    "resume": "esper_core.tolaria.progress_file:resume",
    "resume_run": "esper_core.tolaria.run:resume_run",
    "save_growth": "esper_core.tolaria.model_file:save_growth",
    "save_pretrained": "esper_core.tolaria.hub_folder:save_pretrained",
    "save_progress": "esper_core.tolaria.progress_file:save_progress",
    "sight_of": "esper_core.kasmina.sight:sight_of",
    "split_reference": "esper_core.registry:split_reference",
    "start_run": "esper_core.tolaria.run:start_run",
    "to_batch": "esper_core.tolaria.labels:to_batch",
}
"""Every public name and where it is. The imports above say the same to type checkers; a test compares them."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'esper_core' has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = PUBLIC[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        extra = module.rpartition(".")[2]
        if not module.startswith("esper_core.integrations.") or str(error.name).startswith("esper_core"):
            raise
        needed = f"esper_core.{name} needs {error.name}, which is not installed"
        raise ImportError(f"{needed}; try: pip install 'esper-core[{extra}]'", name=error.name) from error


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "PUBLIC", "__version__"])
