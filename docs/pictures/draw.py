"""Draws the pictures of README and site from code and recorded results: `python docs/pictures/draw.py`; `--check` compares.

`frontier.svg`: protocol P8 of `benchmarks/growth`, every tuned arm at 1e15 FLOP; `frontier-narrow.svg`: the same for
phones. `lifecycle.svg`: the table of stages. `plane.svg`: a host with its slots. `judged.svg`: gains beside their rent.
`billion.svg`: losses of the GPT that deepens to 1.2 billion parameters, of `benchmarks/several_gpus`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path

from esper_core.leyline.stages import EMPTY, STAGES, TRANSITIONS, Op

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "growth" / "results" / "p8.json"
BILLION = HERE.parents[1] / "benchmarks" / "results" / "several-gpus.json"
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2430 } .dim { fill: #565d6b } .line { stroke: #8a91a0; fill: none }
.grown { fill: #1a7f4b } .static { fill: #3d55b8 } .box { fill: #eef0f8; stroke: #3d55b8 } .new { fill: #d8f0e3; stroke: #1a7f4b }
.back { fill: #ffffff } .head { font-weight: 600 }
@media (prefers-color-scheme: dark) { text { fill: #e6e8ee } .dim { fill: #aab1c0 } .back { fill: #16181f }
.grown { fill: #57d495 } .static { fill: #93a7ff } .box { fill: #232738; stroke: #93a7ff } .new { fill: #173527; stroke: #57d495 } }
</style>"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """One picture that needs nothing else."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>", STYLE, f'<rect class="back" width="{width}" height="{height}" rx="6"/>',
            *parts, "</svg>", "",
        ]
    )  # fmt: skip


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(what)}</text>'


def frontier(*, narrow: bool = False) -> str:
    """Loss by size at equal FLOPs: the static networks, and the one that grew."""
    summary = next(s for s in json.loads(RESULTS.read_text())["summaries"] if s["name"] == "p8-1e15")
    arms = summary["tuned"]
    static = {n: a for n, a in arms.items() if a["static"]}
    grown = {n: a for n, a in arms.items() if n == "heuristic 3x128"}
    left, right, top, bottom = (60.0, 376.0, 346.0, 594.0) if narrow else (356.0, 860.0, 62.0, 288.0)
    least, most, low, high = 0.5e6, 4.25e6, 0.975, 1.07

    def place(arm: dict[str, float]) -> tuple[float, float]:
        x = left + (arm["params"] - least) / (most - least) * (right - left)
        return x, bottom - (arm["validation_loss"] - low) / (high - low) * (bottom - top)

    claim = ("At equal compute it ends below", "every static size tried")
    parts = [text(24, 30, "3 blocks become 12 in training", "head")]
    if narrow:
        parts += [text(24, top - 50 + line * 18, words, "head") for line, words in enumerate(claim)]
    else:
        parts.append(text(left - 36, 30, " ".join(claim), "head"))
    base, step = (218, 108) if narrow else (268, 92)
    for column, (count, told) in enumerate(((3, "begins"), (6, "copied once"), (12, "copied twice"))):
        x = 46 + column * step
        for block in range(count):
            y = base - block * (15 if narrow else 17)
            parts.append(
                f'<rect x="{x}" y="{y}" width="48" height="{11 if narrow else 13}" rx="3" class="{"box" if block < 3 else "new"}"/>'
            )
        parts.append(text(x + 24, base + 32, told, "dim", "middle"))
    parts.append(f'<path class="line" d="M{left} {top} V{bottom} H{right}"/>')
    for loss in (0.98, 1.0, 1.02, 1.04, 1.06):
        y = bottom - (loss - low) / (high - low) * (bottom - top)
        parts.append(text(left - 6, y + 4, f"{loss:.2f}", "dim", "end"))
        parts.append(f'<path class="line" stroke-opacity=".25" d="M{left} {y:.1f} H{right}"/>')
    for millions in (1, 2, 3, 4):
        x = left + (millions * 1e6 - least) / (most - least) * (right - left)
        parts.append(text(x, bottom + 16, f"{millions}M", "dim", "middle"))
    parts.append(text((left + right) / 2, bottom + 38, "parameters at the end", "dim", "middle"))
    parts.append(text(left + 4, top - 8, "validation loss, nats a byte", "dim"))
    for name, arm in static.items():
        x, y = place(arm)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="static"><title>{escape(name)}: {arm["validation_loss"]:.4f}</title></circle>'
        )
    for name, arm in grown.items():
        x, y = place(arm)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" class="grown"><title>{escape(name)}: {arm["validation_loss"]:.4f}</title></circle>'
        )
        parts.append(text(x + 14, y + 4, "grown by Esper", "grown"))
    best = min(static.values(), key=lambda a: a["validation_loss"])
    x, y = place(best)
    parts.append(text(x - 12, y + 18, "best static size", "static", "end"))
    pair = next(pair for pair in summary["paired"] if pair["arm"] == "heuristic 3x128")
    share = f"{-100 * pair['share']:.1f}%"
    told = (
        ("A byte-level GPT, 1e15 FLOP a run, AdamW (protocol P8).", "Validation text, one seed, two or three rates a point.",
         f"On test text, {pair['n']} fresh seeds: {share} below the best.")
        if narrow
        else ("A byte-level GPT, 1e15 FLOP a run, AdamW, validation text, one seed; two or three learning rates tried for each point",
              f"(protocol P8). On the test text, over {pair['n']} fresh seeds: {share} below the best static size.")
    )  # fmt: skip
    parts += [text(24, bottom + 60 + line * 18, words, "dim") for line, words in enumerate(told)]
    return svg(
        *((400, 706) if narrow else (900, 376)),
        "Loss against size at equal compute: the grown network is below all static ones",
        parts,
    )


def plane() -> str:
    """A host of three blocks, a slot behind each, and what stands in one of them."""
    parts = [text(20, 28, "A host and its plane", "head")]
    for block in range(3):
        x = 74 + block * 212
        parts.append(f'<rect x="{x}" y="56" width="104" height="44" rx="6" class="box"/>')
        parts.append(text(x + 52, 83, f"block {block + 1}", "", "middle"))
        parts.append(
            f'<circle cx="{x + 158}" cy="78" r="17" class="{"new" if block == 1 else "back"}" stroke="#8a91a0"/>'
        )
        parts.append(text(x + 158, 126, "slot, empty" if block != 1 else "slot with a seed", "dim", "middle"))
        parts.append(arrow(x + 104, 78, x + 141, 78))
        parts.append(arrow(x + 175, 78, x + 212, 78))
    parts += [text(20, 83, "input"), arrow(56, 78, 74, 78), text(714, 83, "head")]
    parts.append('<path class="line" d="M444 134 V166"/>')
    parts.append('<rect x="330" y="166" width="228" height="44" rx="6" class="new"/>')
    parts.append(text(444, 193, "h + alpha · seed(h)", "", "middle"))
    parts.append(text(578, 184, "alpha rises from 0 to 1", "dim"))
    parts.append(text(578, 202, "while the seed is blended in", "dim"))
    parts.append(text(20, 184, "An empty slot returns h, bit for bit.", "dim"))
    return svg(770, 230, "A host of three blocks with a slot behind each; the second holds a seed", parts)


def judged() -> str:
    """Three intervals of gains beside their rents; an illustration without a run."""
    left, scale = 310.0, 4200.0
    rows = (
        ("above its rent: kept", 0.062, 0.021, 0.02, "grown"),
        ("mean above, interval not: undecided", 0.036, 0.030, 0.02, "static"),
        ("below its rent: withers", 0.004, 0.013, 0.02, "dim"),
    )
    parts = [text(20, 28, "Gain of a seed: validation loss without it less with it (an illustration)", "head")]
    for number, (told, mean, half, rent, kind) in enumerate(rows):
        y = 66 + number * 40
        x, r = left + mean * scale, left + rent * scale
        parts.append(text(20, y + 4, told, kind))
        parts.append(
            f'<path class="line" style="stroke-width:2" d="M{x - half * scale:.1f} {y} H{x + half * scale:.1f}"/>'
        )
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="6" class="{kind}"/>')
        parts.append(f'<path class="line" stroke-dasharray="3 3" d="M{r:.1f} {y - 16} V{y + 16}"/>')
    parts.append(text(left + 0.02 * scale, 186, "rent", "dim", "middle"))
    parts.append(f'<path class="line" d="M{left:.1f} 50 V162"/>')
    parts.append(text(left, 186, "0", "dim", "middle"))
    parts.append(text(left + 0.07 * scale, 186, "nats", "dim"))
    return svg(770, 204, "The gain of three seeds as intervals beside their rent", parts)


def lifecycle() -> str:
    """The stages in a row, with what leads from one to the next."""
    row = [EMPTY]
    while True:
        after = [
            t.target for t in TRANSITIONS if t.source == row[-1] and t.op in (Op.ADVANCE, Op.GERMINATE) and t.target
        ]
        after = [stage for stage in after if stage not in row]
        if not after:
            break
        row.append(min(after, key=lambda s: list(STAGES).index(s)))
    rest = [stage for stage in STAGES if stage not in row]
    parts, places = [text(20, 28, "The life of a seed", "head")], {}
    for number, stage in enumerate(row):
        places[stage] = 20.0 + number * 134, 52.0
    for number, stage in enumerate(rest):
        places[stage] = 422.0 + number * 134, 186.0
    for stage, (x, y) in places.items():
        kind = "new" if STAGES[stage].contributes else "box"
        parts.append(
            f'<rect x="{x}" y="{y}" width="108" height="34" rx="6" class="{kind}"><title>{escape(STAGES[stage].summary)}</title></rect>'
        )
        parts.append(f'<text x="{x + 54}" y="{y + 22}" text-anchor="middle" style="font-size:11px">{stage.name}</text>')
    for one, two in pairwise(row):
        x, y = places[one]
        gates = [g for t in TRANSITIONS if t.source == one and t.target == two for g in t.gates]
        parts.append(arrow(x + 108, y + 17, places[two][0], y + 17))
        for line, gate in enumerate(gates[:2]):
            parts.append(f'<text x="{x + 121}" y="{108 + line * 15}" text-anchor="middle" class="dim" style="font-size:9px">'
                         f"{escape(gate.measure)} {escape(gate.comparison)} {gate.threshold:g}</text>")  # fmt: skip
    for one, two in pairwise(rest):
        parts.append(arrow(places[one][0] + 108, 203, places[two][0], 203))
    parts.append(f'<path class="line" d="M{places[row[2]][0]} 142 H{places[row[-1]][0] + 108}"/>')
    parts.append(arrow(476, 142, 476, 186))
    parts.append(text(490, 166, "a seed that does not pay withers; at alpha 0 it is culled at once", "dim"))
    parts.append(text(20, 208, "green: the seed changes the model's output", "dim"))
    return svg(960, 240, "Stages of a seed from dormant to fossilized, and the way out by withering", parts)


def billion() -> str:
    """Losses before and after the deepening, each stretch of 20 steps."""
    rows = [row for row in json.loads(BILLION.read_text())["billion"] if row["stage"] == "training"]
    left, right, top, bottom, most = 70.0, 700.0, 64.0, 250.0, 3.0
    last = rows[-1]["step"]

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (min(loss, most) - 1.0) / (most - 1.0) * (bottom - top)

    deepened = next(row["step"] for row in rows if row["deepened"])
    x = place(deepened, 1.0)[0]
    parts = [
        text(24, 28, "Validation loss (nats a byte) while 605M parameters become 1.21B", "head"),
        f'<path class="line" stroke-dasharray="4 4" d="M{x:.1f} {top} V{bottom}"/>',
        text(x + 6, top + 12, f"12 blocks become 24 after step {deepened}", "dim"),
        f'<path class="line" d="M{left} {top} V{bottom} H{right}"/>',
    ]
    for loss in (1.0, 2.0, 3.0):
        parts.append(text(left - 8, place(0, loss)[1] + 4, f"{loss:.0f}", "dim", "end"))
    points = [(row, *place(row["step"], row["validation_loss"])) for row in rows]
    trace = " L".join(f"{x:.1f} {y:.1f}" for _, x, y in points)
    parts.append(f'<path class="line" d="M{trace}"/>')
    for row, x, y in points:
        kind = "grown" if row["layers"] == 24 else "static"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(text(x, y - 10, f"{row['validation_loss']:.2f}", "dim", "middle"))
        parts.append(text(x, bottom + 18, f"{row['step']}", "dim", "middle"))
    parts.append(text(right, bottom + 36, "steps of 65,536 bytes", "dim", "end"))
    return svg(740, 300, "Validation loss of a GPT that deepens to 1.21 billion parameters", parts)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head."""
    if x1 == x2:
        head = f"M{x2 - 4} {y2 - 7} L{x2} {y2} L{x2 + 4} {y2 - 7}"
    else:
        head = f"M{x2 - 7} {y2 - 4} L{x2} {y2} L{x2 - 7} {y2 + 4}"
    return f'<path class="line" d="M{x1} {y1} L{x2} {y2} {head}"/>'


PICTURES = {
    "frontier.svg": frontier,
    "frontier-narrow.svg": partial(frontier, narrow=True),
    "lifecycle.svg": lifecycle,
    "plane.svg": plane,
    "billion.svg": billion,
    "judged.svg": judged,
}


def main(arguments: list[str]) -> int:
    """Write the pictures, or with `--check` say which differ."""
    differing = 0
    for name, draw in PICTURES.items():
        drawn, path = draw(), HERE / name
        if "--check" in arguments:
            same = path.is_file() and path.read_text("utf-8") == drawn
            differing += not same
            print("" if same else f"{path} differs: python docs/pictures/draw.py", end="" if same else "\n")
        else:
            path.write_text(drawn, "utf-8")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
