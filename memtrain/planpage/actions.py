"""What happens to the saved tensors: a map of blocks by tokens for each class, and the same in words.

In the map every block is a row and every class a panel, in which the tokens run from left to right. The
whole plan is drawn small; behind each range of blocks the same is drawn large, with the actions written in.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from memtrain.charts import Frame
from memtrain.htmlpage import figure, folded, paragraph, table
from memtrain.planner.ranges.choices import Action, Kind, stored_bytes
from memtrain.planner.ranges.model import Problem
from memtrain.planpage.colours import Ink, legend
from memtrain.planpage.content import PageInput
from memtrain.planpage.fold import Alike, fold_activations, fold_states
from memtrain.planpage.words import (
    action_text,
    brief_texts,
    class_names,
    gib_cell,
    names_text,
    range_text,
)

_WIDTH, _TOP = 860, 22
_GAP = 10
"""Between panels."""
_LETTER = 5.6
"""Width of a letter at 10 px, upwards of what a sans-serif font takes on average."""
_MOST_NAME = 22
"""Letters of a block's name beside the map; of a longer one the end is shown."""
_SMALL_HEIGHT, _SMALL_ROW = 840, (5.0, 14.0)
"""Of the whole map at most, and of a row at least and at most."""
_LEAST_LABEL_STEP = 9.5
"""Names closer than this would overlap: then every second block is named, every third ..."""
_LARGE_ROW = 20.0
_LARGE_BLOCKS = 16
_OPEN_ROWS = 16
"""A table of decisions with more rows is folded away."""


def action_map(page: PageInput, inks: Mapping[str, Ink]) -> str:
    """HTML: bytes by class and action, the map, and the decisions block by block."""
    names = class_names(page.problem)
    if not names:
        return paragraph("No block saves tensors that could be decided on.") + _decisions(page)
    entries = [(action_text(label), f'class="{ink.css_class}"') for label, ink in inks.items()]
    count = len(page.problem.blocks)
    low, high = _SMALL_ROW
    row = min(high, max(low, _SMALL_HEIGHT / count))
    parts = [
        _bytes_table(page, inks),
        legend(entries),
        paragraph("Tokens run from left to right in every panel, the first token leftmost."),
        figure(_map(page, inks, range(count), row)),
    ]
    if count > _LARGE_BLOCKS:
        ranges = -(-count // _LARGE_BLOCKS)
        edges = [number * count // ranges for number in range(ranges + 1)]
        for start, stop in pairwise(edges):
            blocks = range(start, stop)
            shown = names_text([page.problem.blocks[i].name for i in blocks])
            large = figure(_map(page, inks, blocks, _LARGE_ROW, written=True))
            parts.append(folded(f"Enlarged: {shown}", large))
    return "\n".join([*parts, _decisions(page)])


def _bytes_table(page: PageInput, inks: Mapping[str, Ink]) -> str:
    """GiB of what forward saves, uncompressed, by class and action; and what of it stays on the device."""
    sizes: dict[str, dict[str, int]] = {}
    for block, decided in zip(page.problem.blocks, page.plan.blocks, strict=True):
        tensors = {tensor.name: tensor for tensor in block.classes}
        for part in decided.ranges:
            row = sizes.setdefault(part.tensor, {})
            plain = (part.stop - part.start) * tensors[part.tensor].chunk_bytes
            row[part.action] = row.get(part.action, 0) + plain
    header = ["saved tensors (GiB)", *[action_text(label) for label in inks], "sum"]
    rows = [
        [name, *[gib_cell(sizes[name].get(label, 0)) for label in inks], gib_cell(sum(sizes[name].values()))]
        for name in class_names(page.problem)
        if name in sizes
    ]
    totals = [sum(row.get(label, 0) for row in sizes.values()) for label in inks]
    rows.append(["sum", *[gib_cell(total) for total in totals], gib_cell(sum(totals))])
    if any(ink.hatched for ink in inks.values()):
        stored = _stored(page.problem, page, inks)
        rows.append(["as stored", *[gib_cell(size) for size in stored], gib_cell(sum(stored))])
    return table(header, rows)


def _stored(problem: Problem, page: PageInput, inks: Mapping[str, Ink]) -> list[int]:
    """By action: what is left of its chunks between forward and backward."""
    found = dict.fromkeys(inks, 0)
    for block, decided in zip(problem.blocks, page.plan.blocks, strict=True):
        tensors = {tensor.name: tensor for tensor in block.classes}
        for part in decided.ranges:
            size = stored_bytes(problem, tensors[part.tensor], _action(part.action))
            found[part.action] += (part.stop - part.start) * size
    return list(found.values())


def _action(label: str) -> Action:
    kind, *rest = label.split(":")
    compressed = kind.startswith("compress")
    return Action(
        kind=Kind(kind),
        codec=rest[0] if compressed else "",
        place=rest[-1] if kind.endswith("swap") else "",
    )


def _map(
    page: PageInput, inks: Mapping[str, Ink], blocks: range, row: float, *, written: bool = False
) -> str:
    """Rows of ``row`` SVG units for ``blocks``; ``written`` puts the actions' names into their ranges."""
    names = class_names(page.problem)
    left = 12 + _LETTER * min(_MOST_NAME, max(len(page.problem.blocks[i].name) for i in blocks))
    panel = (_WIDTH - left - _GAP * len(names)) / len(names)
    frame = Frame(width=_WIDTH, height=round(_TOP + row * len(blocks) + 6))
    edges = [left + number * (panel + _GAP) for number in range(len(names))]
    parts = [
        f'<text x="{edge:.1f}" y="14">{html.escape(_cut(name, panel))}</text>'
        for name, edge in zip(names, edges, strict=True)
    ]
    label_step = math.ceil(_LEAST_LABEL_STEP / row)
    letters = min(10.0, row * label_step - 1)
    for number, index in enumerate(blocks):
        top = _TOP + number * row
        if number % label_step == 0:
            name = page.problem.blocks[index].name
            shown = name if len(name) <= _MOST_NAME else f"…{name[1 - _MOST_NAME :]}"
            parts.append(
                f'<text x="{left - 6:.1f}" y="{top + row / 2 + 3.5:.1f}" font-size="{letters:.1f}" '
                f'text-anchor="end">'
                f"{html.escape(shown)}</text>"
            )
        parts += _row(page, inks, index, dict(zip(names, edges, strict=True)), panel, top, row, written)
    first, last = page.problem.blocks[blocks[0]].name, page.problem.blocks[blocks[-1]].name
    return frame.svg(parts, f"Actions of {first} to {last} by class and tokens; in words in the table below")


def _row(
    page: PageInput,
    inks: Mapping[str, Ink],
    index: int,
    edges: Mapping[str, float],
    panel: float,
    top: float,
    row: float,
    written: bool,
) -> list[str]:
    block, decided = page.problem.blocks[index], page.plan.blocks[index]
    chunks = {tensor.name: tensor.chunks for tensor in block.classes}
    height = row - (1 if row > 7 else 0.5)
    parts = []
    for part in decided.ranges:
        unit, ink = panel / chunks[part.tensor], inks[part.action]
        x, width = edges[part.tensor] + part.start * unit, (part.stop - part.start) * unit
        text = range_text(part, chunks[part.tensor])
        span = f"chunks {part.start + 1} to {part.stop} of {chunks[part.tensor]}"
        title = html.escape(f"{block.name}, {part.tensor}, {span}: {text}")
        parts.append(
            f'<rect class="{ink.css_class}" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"><title>{title}</title></rect>'
        )
        fitting = [t for t in brief_texts(part, chunks[part.tensor]) if len(t) * _LETTER < width - 4]
        if written and fitting:
            # Beneath the letters a hatching is covered with its own colour.
            cover = f' stroke="{ink.colour}"' if ink.hatched else ""
            parts.append(
                f'<text class="on"{cover} x="{x + width / 2:.1f}" y="{top + row / 2 + 3:.1f}" '
                f'text-anchor="middle">{html.escape(fitting[0])}</text>'
            )
    return parts


def _cut(text: str, width: float) -> str:
    """What of a heading fits."""
    letters = int(width / 6.4)
    return text if len(text) <= letters else text[: max(1, letters - 1)] + "…"


def _decisions(page: PageInput) -> str:
    """Block by block, blocks that are treated alike as one row."""
    activations, states = fold_activations(page.plan), fold_states(page.plan)
    return "\n".join(
        _decision_table(what, rows)
        for what, rows in (("saved tensors", activations), ("weights, gradients, optimizer", states))
        if rows
    )


def _decision_table(what: str, rows: Sequence[Alike]) -> str:
    header = list(dict.fromkeys(name for row in rows for name, _ in row.actions))
    cells = [[row.blocks, *[dict(row.actions).get(name, "-") for name in header]] for row in rows]
    differ = f"{len(rows)} different ways" if len(rows) > 1 else "all blocks alike"
    return folded(
        f"Decisions block by block: {what} ({differ})",
        f'<div class="words">{table(["blocks", *header], cells)}</div>',
        open_=len(cells) <= _OPEN_ROWS,
    )


def labels_of(page: PageInput) -> Sequence[str]:
    """Every action of the plan."""
    return [part.action for block in page.plan.blocks for part in block.ranges]
