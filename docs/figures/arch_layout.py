"""Who sees whom, in four uses: each token sees an interval of keys, first to last."""

import style
import torch
from style import B, T

from minllama.architecture.layout import Layout, packed

CELL, TOP = 22, 66
d = style.Drawing("arch_layout", "Four masks, each a row of intervals", 720, 258)
six = torch.arange(6)[None]
late = torch.tensor([[4, 5]])
USES = [
    ("a text", "T = S = 6", Layout(positions=six), 6),
    ("two documents", "packed(0 1 2 3 0 1)",
     packed(torch.tensor([[0, 1, 2, 3, 0, 1]])), 6),
    ("after a cache of 4", "T = 2, S = 6", Layout(positions=late, start=4), 6),
    ("a window of 3", "layout.within(3, S)", Layout(positions=six).within(3, 6), 6),
]  # fmt: skip

for panel, (name, code, layout, S) in enumerate(USES):
    x = 26 + 177 * panel
    seen, (first, last) = layout.mask(S)[0, 0], layout.interval(S)
    rows = seen.size(0)
    top = TOP + (6 - rows) * CELL
    for t in range(rows):
        for s in range(S):
            color, fill = (T, 0.5) if seen[t, s] else (B, 0.0)
            d.box(x + s * CELL, top + t * CELL, CELL, CELL, color=color, fill=fill)
    w = S * CELL
    d.text(x + w / 2, 22, name, size=14.5, style="font-weight:600")
    d.text(x + w / 2, 44, code, size=12.5, font=style.MONO)
    for k, (word, values) in enumerate((("first", first), ("last", last))):
        y = TOP + 6 * CELL + 22 + 24 * k
        d.text(x - 4, y, word, size=12.5, anchor="start", style="font-style:italic")
        numbers = "  ".join(str(value) for value in values[0].tolist())
        d.text(x + w, y, numbers, size=12.5, anchor="end", font=style.MONO)
d.save()
