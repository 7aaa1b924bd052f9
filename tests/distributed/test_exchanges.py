"""What two processes exchange in a step of `fsdp2`: no more than a loop written by hand, and one meeting."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_core.leyline.errors import BadOption
from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.setup import check_settings
from tests.distributed.exchanges import BLOCKS
from tests.distributed.processes import call


@pytest.mark.slow
def test_a_step_exchanges_what_one_by_hand_does(tmp_path: Path) -> None:
    for found in call(2, "tests.distributed.exchanges:count", str(tmp_path)):
        groups = BLOCKS + 1  # the blocks, and what is left of the host
        # by hand all groups are gathered twice but for the last, which is needed again at once
        assert found["by hand"] == {"allgather": 2 * groups - 1, "reduce_scatter": groups}
        assert found["not kept"] == {"allgather": 2 * groups - 1 + 1, "reduce_scatter": groups}
        assert found["kept"] == {"allgather": groups + 1, "reduce_scatter": groups}
        grown, less = found["kept, grown"], found["not kept, grown"]
        assert (grown["allgather"], grown["reduce_scatter"]) == (groups + 1 + 1, groups + 1)
        assert (less["allgather"], less["reduce_scatter"]) == (2 * groups - 1 + 2 + 1, groups + 1)  # the copy's, twice
        fewer = found["not kept, a decision"]["allgather"] - found["kept, a decision"]["allgather"]
        assert fewer >= 2 * groups  # passes with and without the copy, of which the first gathers
        assert grown["whole"] == less["whole"] == 0  # between steps nothing is whole


def test_its_options_are_refused_where_nothing_is_sharded() -> None:
    with pytest.raises(BadOption, match=r"fsdp2\.keep.*no effect"):
        check_settings(RunConfig(settings={"fsdp2.keep": 0.1}), load_registry())
    check_settings(RunConfig(settings={"fsdp2.keep": 0.1}, strategy="fsdp2"), load_registry())
