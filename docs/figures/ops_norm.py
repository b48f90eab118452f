"""The weight's gradient is a sum over rows: a row of sums a row, or a row a program."""

import style
from style import ACCENT, INK, B, D, T

ROW, TOP, W = 15, 62, 100
COLORS = [T, D, style.H]
d = style.Drawing("ops_norm", "Partial sums of the weight's gradient", 720, 246)


def rows(x: float, n: int, color, fill=0.18, top=TOP) -> None:
    for i in range(n):
        d.box(x, top + i * ROW, W, ROW - 3, color=color(i), fill=fill)


d.text(165, 16, "one program a row", size=14.5, style="font-weight:600")
rows(30, 9, lambda i: B)
rows(200, 9, lambda i: ACCENT, 0.3)
for i in range(9):
    d.line(134, TOP + i * ROW + 6, 196, TOP + i * ROW + 6, arrow=True, width=1)
d.text(80, 42, "x, dy", size=13, font=style.MONO)
d.text(250, 42, "summands of dw", size=13)
d.text(165, TOP + 9 * ROW + 20, "memory: as many rows again,", size=13)
d.text(165, TOP + 9 * ROW + 38, "in float32, written and read", size=13)

d.text(545, 16, "three programs that stay", size=14.5, style="font-weight:600")
rows(390, 9, lambda i: COLORS[i % 3], 0.25)
for i in range(9):
    end = TOP + 45 + (i % 3) * ROW + 6
    d.line(494, TOP + i * ROW + 6, 576, end, color=COLORS[i % 3], width=1, arrow=i > 5)
rows(580, 3, lambda i: COLORS[i], 0.5, TOP + 45)
d.text(440, 42, "x, dy", size=13, font=style.MONO)
d.text(630, 42, "partial sums", size=13)
d.text(545, TOP + 9 * ROW + 20, "summed in registers, row after row;", size=13)
d.text(545, TOP + 9 * ROW + 38, "three rows written, always in this order", size=13)
d.line(684, TOP + 66, 700, TOP + 66, color=INK, arrow=True, width=1)
d.save()
