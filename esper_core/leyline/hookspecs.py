"""The hooks that a plugin may implement. They grow by adding arguments or hooks only."""

# The bodies are empty because only their names, arguments and docstrings count.
# mypy: disable-error-code="empty-body"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper_core.leyline import specs
    from esper_core.leyline.actions import Command
    from esper_core.leyline.events import Event

GROUP = "esper_core"
"""The entry-point group in which plugins register, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def esper_hosts() -> Sequence[specs.HostSpec]:
    """Hosts that this plugin offers. (API 1)"""


@hookspec
def esper_blueprints() -> Sequence[specs.BlueprintSpec]:
    """Blueprints that this plugin offers. (API 1)"""


@hookspec
def esper_blends() -> Sequence[specs.BlendSpec]:
    """Blends, combinations and curves, that this plugin offers. (API 1)"""


@hookspec
def esper_rewards() -> Sequence[specs.RewardSpec]:
    """Reward terms that this plugin offers. (API 1)"""


@hookspec
def esper_controllers() -> Sequence[specs.ControllerSpec]:
    """Controllers that this plugin offers. (API 1)"""


@hookspec
def esper_adapters() -> Sequence[specs.AdapterSpec]:
    """Kinds of adapters on the frozen Tamiyo core that this plugin offers. (API 1)"""


@hookspec
def esper_tasks() -> Sequence[specs.TaskSpec]:
    """Tasks that this plugin offers. (API 1)"""


@hookspec
def esper_sinks() -> Sequence[specs.SinkSpec]:
    """Telemetry sinks that this plugin offers. (API 1)"""


@hookspec
def esper_objectives() -> Sequence[specs.ObjectiveSpec]:
    """Objectives, a training loss with a loss and a metric for each example, that this plugin offers. (API 2)"""


@hookspec
def esper_event(event: Event) -> None:
    """An event of a run was emitted. (API 1)"""


@hookspec(firstresult=True)
def esper_veto(command: Command, plane: Any) -> str | None:
    """Return a reason to refuse `command` on `plane`, or None to let it pass. (API 1)"""
