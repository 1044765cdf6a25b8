"""The page of a plan: ``memtrain plan --html report.html``.

    render(PageInput.of(forecast, title="llama-2-7b on a800-80g")) -> str

One file that opens offline, on light and dark, wide and narrow, without scripts: answers first, then memory
over the step, the queues as Gantt charts, and the map of actions by block and token.
"""

from memtrain.planpage.content import Alternative, PageInput
from memtrain.planpage.page import render

__all__ = ["Alternative", "PageInput", "render"]
