"""The page of a plan: ``memtrain plan --html report.html``.

    render(PageInput(title=..., problem=..., plan=..., ...)) -> str

One file that opens offline, on light and dark, wide and narrow, without scripts: answers first, then memory
over the step, the queues as Gantt charts, and the map of actions by block and token.
"""

from memtrain.planpage.content import Alternative, BillLine, PageInput
from memtrain.planpage.page import render

__all__ = ["Alternative", "BillLine", "PageInput", "render"]
