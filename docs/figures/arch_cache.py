"""The causal triangle, and the one row of it that a decoding step computes."""

import style
from style import B, T

CELL, TOP, N = 25, 66, 8
WORDS = ["Lily", "hugged", "her", "cat", "because", "it", "was", "sad", "today"]
d = style.Drawing("arch_cache", "The causal triangle, and its newest row", 720, 348)


def triangle(x, rows, new) -> None:
    """Rows of what each token sees; those before `new` were computed earlier."""
    for row in range(rows):
        fresh = row >= new
        for column in range(row + 1):
            color, fill = (T, 0.55) if fresh else (B, 0.16)
            left, top = x + column * CELL, TOP + row * CELL
            d.box(left, top, CELL, CELL, color=color, fill=fill)
        d.text(x - 8, TOP + (row + 0.5) * CELL, WORDS[row], size=13.5, anchor="end",
               color=T if fresh else style.INK)  # fmt: skip


triangle(96, N, 0)
d.text(96 + N * CELL / 2, 24, "all tokens at once", size=15, style="font-weight:600")
d.text(96 + N * CELL / 2, 44, "T = S = 8: eight rows", size=14)
d.text(214, TOP + 30, "the future:", size=14, anchor="start", style="font-style:italic")
d.text(214, TOP + 49, "not seen", size=14, anchor="start",
       style="font-style:italic")  # fmt: skip
d.text(96 + N * CELL / 2, TOP + N * CELL + 22, "a row: who looks · a column: whose key",
       size=13.5)  # fmt: skip

triangle(440, N + 1, N)
d.text(440 + N * CELL / 2, 24, "the next token, with a cache", size=15,
       style="font-weight:600")  # fmt: skip
d.text(440 + N * CELL / 2, 44, "T = 1, S = 9: one row", size=14)
d.text(562, TOP + 30, "computed before,", size=14, anchor="start",
       style="font-style:italic")  # fmt: skip
d.text(562, TOP + 49, "right for ever", size=14, anchor="start",
       style="font-style:italic")  # fmt: skip
LOW = TOP + 9 * CELL + 12
d.line(440, LOW, 440 + 8 * CELL - 2, LOW, B, width=3)
d.text(440 + 4 * CELL, LOW + 18, "keys and values kept", size=13.5)
d.line(440 + 8 * CELL + 2, LOW, 440 + 9 * CELL, LOW, T, width=3)
d.text(440 + 8.5 * CELL, LOW + 18, "new", size=13.5, color=T)
d.save()
