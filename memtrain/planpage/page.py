"""The page of a plan, put together."""

from __future__ import annotations

from memtrain.htmlpage import document, paragraph, preformatted, sections
from memtrain.planpage.actions import action_map, labels_of
from memtrain.planpage.answers import ablation, bill, certificate, remedies, sources, verdict
from memtrain.planpage.colours import action_inks, hatches, ink_style
from memtrain.planpage.content import PageInput
from memtrain.planpage.memory import memory_over_the_step
from memtrain.planpage.queues import queues_of_the_step

_STYLE = """
body { max-width: 1100px; }
h3 { margin: 1.2em 0 0.2em; font-size: 1em; }
td { white-space: nowrap; }
.bill tr:nth-last-child(-n + 3) { font-weight: bold; }
.words td, .words th { text-align: left; vertical-align: top; }
.words td:nth-child(n + 3) { white-space: normal; min-width: 9em; }
.words td:last-child { overflow-wrap: anywhere; }
.verdict { font-size: 1.25em; padding: 0.4em 0.8em; border-left: 6px solid; background: #8881; }
.fits { border-color: #1a7f37; }
.short { border-color: #cf222e; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0.8em; }
.tiles div { border: 1px solid #8884; border-radius: 6px; padding: 0.5em 0.8em; }
.tiles b { display: block; font-size: 1.3em; }
.tiles span { font-size: 0.85em; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2em 1.2em; font-size: 0.9em; }
.legend svg { display: inline; width: 14px; min-width: 0; height: 14px; margin-right: 0.4em;
  vertical-align: -2px; }
svg.defs { position: absolute; width: 0; min-width: 0; height: 0; }
svg .on { fill: #fff; font-size: 10px; pointer-events: none; stroke-width: 5px; paint-order: stroke; }
svg .hover { fill: transparent; }
svg .hover:hover { fill: #8884; }
svg .bar:hover { fill-opacity: 0.6; }
summary { cursor: pointer; margin: 0.4em 0; }
"""


def render(page: PageInput) -> str:
    """One HTML document that loads nothing; the same bytes for the same input."""
    inks = action_inks(page.problem, labels_of(page))
    intro = paragraph("Predicted by simulation from the numbers listed under Sources; nothing was run.")
    body = hatches(inks.values()) + intro + verdict(page) + "\n"
    body += sections(
        [
            ("What would help", remedies(page)),
            ("What lies where", bill(page)),
            ("How good the plan is", certificate(page)),
            ("Against other rules", ablation(page)),
            ("Memory over the step", memory_over_the_step(page)),
            ("Queues", queues_of_the_step(page)),
            ("Saved tensors, block by block", action_map(page, inks)),
            ("How to run it", preformatted(page.command) if page.command else ""),
            ("Sources", sources(page)),
        ]
    )
    return document(page.title, body, style=_STYLE + ink_style(inks.values()))
