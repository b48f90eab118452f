"""The three messages of chapter 3, with the numbers of its notebook."""

import style
from style import B, T

d = style.Drawing("dist_messages", "All-reduce, reduce-scatter, all-gather", 720, 300)
W, ROW, TOP = 33, 40, 92
BROUGHT = [[rank * 10 + i for i in range(4)] for rank in range(4)]
SUM = [sum(column) for column in zip(*BROUGHT)]


def row(x, rank, numbers, color, only=None) -> None:
    """A tensor of one process; `only`: the piece that it holds, the rest is empty."""
    y = TOP + rank * ROW
    for i, number in enumerate(numbers):
        if only is None or i == only:
            d.box(x + i * W, y, W, 26, str(number), color=color, fill=0.22, size=13)
        else:
            d.box(x + i * W, y, W, 26, color=B, fill=0.0)


for rank in range(4):
    d.text(14, TOP + rank * ROW + 13, f"rank {rank}", size=13.5, anchor="start")
    row(70, rank, BROUGHT[rank], B)
    row(315, rank, SUM, T, only=rank)
    row(560, rank, SUM, T)
d.text(136, 62, "what each brings", size=14.5, style="font-weight:600")
d.text(381, 62, "a piece of the sum each", size=14.5, style="font-weight:600")
d.text(626, 62, "all of it, everywhere", size=14.5, style="font-weight:600")
for x, words in ((259, "reduce-scatter"), (504, "all-gather")):
    y = TOP + 2 * ROW - 7
    d.line(x - 45, y, x + 45, y, arrow=True)
    d.text(x, y - 16, words, size=13, style="font-style:italic")
d.line(136, 22, 136, 34)
d.line(136, 22, 626, 22)
d.line(626, 22, 626, 44, arrow=True)
d.text(381, 13, "all-reduce", size=13, style="font-style:italic")
words = "each process sends (n - 1) / n of the tensor for either half"
d.text(381, TOP + 4 * ROW + 18, words, size=13.5)
d.save()
