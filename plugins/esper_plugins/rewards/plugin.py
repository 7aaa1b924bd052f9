"""Registers the rewards that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import RewardSpec

_GAMMA = Option("gamma", "float", 1.0, "the learner's discount, so that cycles cancel", minimum=0.0, maximum=1.0)
_RATE = Option("rate", "float", 0.05, "lambda: what a doubling of the host costs at each step", minimum=0.0)
_POTENTIAL = "Ng, Harada, Russell 1999, Policy invariance under reward transformations"


@hookimpl
def esper_rewards() -> list[RewardSpec]:
    """Every reward of this package."""
    return [
        RewardSpec(
            name="accuracy",
            summary="change of validation accuracy, or of another metric, gained over the twin that waits",
            factory="esper_plugins.rewards.gain:AccuracyGain",
            options=(_GAMMA,),
            source=_POTENTIAL,
        ),
        RewardSpec(
            name="loss",
            summary="change of validation loss gained over the twin that waits",
            factory="esper_plugins.rewards.gain:LossGain",
            options=(_GAMMA,),
            source=_POTENTIAL,
        ),
        RewardSpec(
            name="terminal",
            summary="the gain over the twin at the episode's end, paid once",
            factory="esper_plugins.rewards.gain:TerminalGain",
            options=(Option("measure", "str", "accuracy", "which gain", choices=("accuracy", "loss")),),
        ),
        RewardSpec(
            name="rent",
            summary="minus lambda times the parameters of all seeds over the host's",
            factory="esper_plugins.rewards.costs:Rent",
            options=(_RATE,),
        ),
        RewardSpec(
            name="flops_rent",
            summary="minus lambda times the forward FLOPs of all seeds over the host's",
            factory="esper_plugins.rewards.costs:FlopsRent",
            options=(_RATE,),
        ),
        RewardSpec(
            name="churn",
            summary="minus the validation loss that this step's removals cost",
            factory="esper_plugins.rewards.costs:Churn",
            capabilities={"removal"},
            options=(Option("scale", "float", 1.0, "reward for each nat", minimum=0.0),),
        ),
        RewardSpec(
            name="governor_death",
            summary="minus governor.penalty for each rollback of the governor",
            factory="esper_plugins.rewards.costs:GovernorDeath",
        ),
    ]
