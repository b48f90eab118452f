"""Which tiles of keys a tile of queries visits: skipped, masked, whole."""

import style
import torch
from style import ACCENT, INK, B, T

N, SIZE, CELL, TOP = 64, 8, 24, 58
last = torch.arange(N)
start = torch.tensor([0] * 27 + [27] * 21 + [48] * 16)  # where each document begins
PATTERNS = [
    ("a text", last * 0),
    ("three documents in a row", start),
    ("a window of 20", (last - 19).clamp(min=0)),
]
d = style.Drawing("ops_tiles", "Tiles skipped, masked and whole", 720, 306)

for panel, (name, first) in enumerate(PATTERNS):
    x, counts = 34 + 232 * panel, [0, 0, 0]
    d.text(x + 4 * CELL, 18, name, size=14.5, style="font-weight:600")
    for i, (f, m) in enumerate(zip(first.split(SIZE), last.split(SIZE))):
        for j in range(N // SIZE):
            low = j * SIZE
            some = low <= m.max() and low + SIZE > f.min()
            every = low >= f.max() and low + SIZE - 1 <= m.min()
            kind = int(some) + int(some and every)
            counts[kind] += 1
            color, fill = [(B, 0.0), (ACCENT, 0.3), (T, 0.4)][kind]
            d.box(x + j * CELL, TOP + i * CELL, CELL, CELL, color=color, fill=fill)
    one = CELL / SIZE  # pixels a key
    for edge in (first, last + 1):  # of what is seen
        steps = "".join(f"H{x + int(k) * one:g}v{one:g}" for k in edge)
        d.parts.append(
            f'<path d="M{x + int(edge[0]) * one:g} {TOP}{steps}" fill="none" '
            f'stroke="{INK}" stroke-width="1.5"/>'
        )
    words = "{} skipped · {} masked · {} whole".format(*counts)
    d.text(x + 4 * CELL, TOP + 8 * CELL + 22, words, size=13)
    d.text(x + 4 * CELL, 42, "keys", size=12)
turned = f"transform:rotate(-90deg);transform-origin:16px {TOP + 4 * CELL}px"
d.text(16, TOP + 4 * CELL, "queries", size=12, style=turned)
d.save()
