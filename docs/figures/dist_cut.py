"""Tensor parallel: columns, then rows, and one sum at the end."""

import style
from style import B, H, T

d = style.Drawing("dist_cut", "A matrix cut by columns, the next by rows", 720, 268)


def matrix(x, y, w, h, wide, tall, mine, color) -> None:
    """A matrix, and the part of it that a rank has."""
    d.box(x, y, w, h, color=B, fill=0.0)
    left, top = x + mine * w / wide if wide > 1 else x, y + (
        mine * h / tall if tall > 1 else 0)  # fmt: skip
    d.box(left, top, w / wide, h / tall, color=color, fill=0.4)


for rank, color in ((0, T), (1, H)):
    y = 48 + 108 * rank
    d.text(20, y + 36, f"rank {rank}", size=14, anchor="start", style="font-weight:600")
    d.box(84, y + 16, 62, 40, "x", color=B, fill=0.25, size=14)
    d.text(162, y + 36, "×", size=17)
    matrix(178, y + 5, 92, 62, 2, 1, rank, color)
    d.line(284, y + 36, 322, y + 36, arrow=True)
    d.text(303, y + 20, "silu", size=13, style="font-style:italic")
    d.box(334, y + 16, 46, 40, "", color=color, fill=0.25)
    d.text(396, y + 36, "×", size=17)
    matrix(412, y - 10, 62, 92, 1, 2, rank, color)
    d.line(488, y + 36, 520, y + 36, arrow=True)
    d.box(530, y + 16, 62, 40, "", color=color, fill=0.25)
    d.line(600, y + 36, 634, 138 - 14 + 28 * rank, arrow=True)
d.box(640, 118, 62, 40, "sum", color=B, fill=0.25, size=14)
d.text(224, 22, "up: by columns", size=14, style="font-weight:600")
d.text(443, 22, "down: by rows", size=14, style="font-weight:600")
d.text(561, 22, "a part of the sum", size=14)
d.text(334, 138, "some of the channels each", size=13, style="font-style:italic")
d.text(671, 178, "one all-reduce", size=13, style="font-style:italic")
d.save()
