"""A new stage is one row of the lifecycle table, with the transitions that lead to it and on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from esper_core.leyline import stages

ROOT = Path(__file__).parents[2]

ROW = """
    ROOTING = "rooting", StageSpec(
        summary="alpha held for some steps before anything is measured", colour="#123456", rank=1, recorded=True,
        occupied=True, pays_rent=True, contributes=True, sensors=("alpha", "delta_norm"),
    )
    SHADOWING = """
STEPS = """Transition(Stage.BLENDING, Stage.ROOTING, Op.ADVANCE, automatic=True, gates=(_RAMPED,)),
    Transition(Stage.ROOTING, Stage.SHADOWING, Op.ADVANCE, automatic=True,
               gates=(Gate("stage_steps", ">=", 10, "it has settled", each_step=True),)),"""

LIFE = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("esper_core.leyline.stages", sys.argv[1])
stages = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = stages
spec.loader.exec_module(stages)

from esper_core.nissa.report.overview import summarise_run
from esper_core.nissa.live_state import LiveState
from esper_core.kasmina.slot import Mode, mode_of
from esper_core.leyline.stages import Stage
from esper_core.nissa.report import write_report
from esper_core.registry import load_registry
from esper_core.tamiyo import features
from esper_core.tamiyo.learned import LearnedController
from tests.recorded.record import record
from tests.tolaria import ground

out = Path(sys.argv[2])
plan = [{"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain", "tempo": "fast"}]
config = ground.config(out / "run", controller=ground.schedule(out / "plan.json", *plan), epochs=6)
views = record(config, ground.registry())
there = [(v, v.slots[0]) for v in views if v.slots[0].stage is Stage.ROOTING]
names = [feature.name for feature in features.SLOT_FEATURES]
row = dict(zip(names, features.read_features(features.SLOT_FEATURES, there[0][1], there[0][0])))
core = LearnedController()
lawful = all(command.op in {s.path: s.legal for s in view.slots}[command.slot]
             for view, _ in there for command in core.decide(view))
events = ground.events(out / "run", "stage_changed")
page = write_report(out / "run").read_text()
watch = LiveState(6)
from tests.recorded import read_events
lines = [watch.take(event) for event in read_events((out / "run" / "events.jsonl").read_text().splitlines())]
print(json.dumps({
    "life": [e["after"] for e in events if e["slot"] == "block1"],
    "mode": mode_of(Stage.ROOTING).value, "seen": len(there), "governor": there[0][0].governor,
    "flag": row["stage_rooting"],
    "settled": Stage.ROOTING.spec.on_trial, "may": sorted(stages.legal_ops(Stage.ROOTING)), "lawful": lawful,
    "report": '"rooting":{"colour":"#123456"' in page.replace('": ', '":'),
    "line": sum("rooting" in (line or "") for line in lines),
    "summary": summarise_run(out / "run")["germinated"],
}))
"""


def test_a_stage_is_one_row(tmp_path: Path) -> None:
    table = Path(stages.__file__).read_text()
    old = "Transition(Stage.BLENDING, Stage.SHADOWING, Op.ADVANCE, automatic=True, gates=(_RAMPED,)),"
    assert old in table
    (tmp_path / "stages.py").write_text(table.replace("\n    SHADOWING = ", ROW, 1).replace(old, STEPS))
    done = subprocess.run(
        [sys.executable, "-c", LIFE, str(tmp_path / "stages.py"), str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    life = told["life"]
    at = life.index("rooting")
    assert life[at - 1 : at + 2] == ["blending", "rooting", "shadowing"]
    assert told["mode"] == "attached" and told["settled"] and told["may"] == ["wait", "wither"]
    assert told["seen"] >= 2 and told["governor"] == "watching"
    assert told["flag"] == 1.0 and told["lawful"]
    assert told["report"] and told["line"] == 1 and told["summary"] == 1
