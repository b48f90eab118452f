"""The gate in two steps and in one: what travels between memory and chip."""

import style
from style import ACCENT, INK, B, D

d = style.Drawing("ops_trips", "Trips to memory of a gate, apart and fused", 720, 236)


def memory(x: float, w: float, cells: list[tuple[float, str, str]]) -> None:
    d.box(x, 168, w, 46, color=B, fill=0.06)
    d.text(x + w / 2, 226, "memory", size=12)
    for at, word, color in cells:
        d.box(at - 31, 175, 62, 26, word, color=color, size=13)


def chip(x: float, w: float, words: str) -> None:
    d.box(x, 58, w, 44, words, color=INK, fill=0.04, size=13.5, font=style.MONO)


d.text(205, 20, "two steps: five numbers travel", size=14.5, style="font-weight:600")
d.text(580, 20, "one kernel: three", size=14.5, style="font-weight:600")
memory(20, 400, [(58, "a", D), (170, "silu(a)", ACCENT), (252, "b", D), (330, "y", D)])
chip(30, 160, "silu(a)")
chip(214, 168, "silu(a) * b")
d.line(58, 175, 58, 104, arrow=True)
d.line(150, 102, 162, 173, color=ACCENT, arrow=True)
d.line(180, 175, 232, 104, color=ACCENT, arrow=True)
d.line(252, 175, 276, 104, arrow=True)
d.line(330, 102, 330, 173, arrow=True)
memory(460, 240, [(500, "a", D), (572, "b", D), (644, "y", D)])
chip(470, 220, "a * sigmoid(a) * b")
d.line(500, 175, 500, 104, arrow=True)
d.line(572, 175, 572, 104, arrow=True)
d.line(644, 102, 644, 173, arrow=True)
d.text(205, 44, "on the chip", size=12)
d.text(580, 44, "on the chip", size=12)
d.save()
