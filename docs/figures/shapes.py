"""The shapes of a forward pass, in the colours of the dimensions."""

import style
from style import B, D, H, T, V

d = style.Drawing(
    "shapes", "Four tensors of a forward pass, from tokens to logits", 720, 250
)
TOP, ROWS, CELL = 78, 5, 20


def tensor(x, columns, top_color, top, name, code, groups=1) -> None:
    """A grid of T rows by some columns, with a copy behind it for the batch."""
    w, h = columns * CELL * groups, ROWS * CELL
    for shift in (10, 5):  # the batch, behind
        d.box(x + shift, TOP - shift, w, h, color=B, fill=0.06)
    for group in range(groups):
        for column in range(columns):
            for row in range(ROWS):
                at = x + (group * columns + column) * CELL
                d.box(at, TOP + row * CELL, CELL, CELL, color=top_color, fill=0.14)
    for group in range(groups):
        at = x + group * columns * CELL
        d.line(at + 1, TOP, at + columns * CELL - 1, TOP, top_color, width=4)
    d.line(x, TOP, x, TOP + h, T, width=4)
    d.text(
        x + w / 2 + 5, TOP - 26, top, color=top_color, size=16, style="font-weight:600"
    )
    d.text(x - 14, TOP + h / 2, "T", color=T, size=16, style="font-weight:600")
    d.text(x + w / 2, TOP + h + 24, name, size=15)
    d.text(x + w / 2, TOP + h + 46, code, size=13.5, font=style.MONO)


def arrow(x, words) -> None:
    d.line(x, TOP + 50, x + 44, TOP + 50, arrow=True)
    d.text(x + 22, TOP + 34, words, size=13, style="font-style:italic")


tensor(40, 1, B, "", "tokens", "(B, T)")
arrow(84, "embed")
tensor(160, 4, D, "D", "vectors", "(B, T, D)")
arrow(264, "project")
tensor(340, 2, H, "H heads of width d", "queries", "(B, T, H, d)", groups=3)
arrow(484, "score")
tensor(560, 6, V, "V", "logits", "(B, T, V)")
d.save()
