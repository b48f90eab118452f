"""One block of a Llama: what is read from the stream, and what is written into it."""

from itertools import pairwise

import style
from style import ACCENT, B, D, H, T

d = style.Drawing("arch_block", "Data flow of one block, with shapes", 720, 322)
STREAM, MID = 282, 142  # heights of the stream and of the middle of the branches


def arrow(*points, color=style.INK) -> None:
    """A path of straight pieces, with a head at its end."""
    for start, end in pairwise(points):
        d.line(*start, *end, color=color, arrow=end == points[-1])


def shape(x, y, words, color=style.INK, anchor="middle") -> None:
    d.text(x, y, words, size=12.5, color=color, anchor=anchor, font=style.MONO)


def step(x, y, w, h, words, color=style.INK, **text) -> None:
    d.box(x, y, w, h, words, color=color, size=14.5, **text)


def plus(x) -> None:
    d.parts.append(
        f'<circle cx="{x}" cy="{STREAM}" r="11" fill="{D}" fill-opacity="0.2" '
        f'stroke="{D}" stroke-width="1.6"/>'
    )
    d.text(x, STREAM - 1, "+", size=18)


d.line(16, STREAM, 424, STREAM, D, width=5)
d.line(446, STREAM, 660, STREAM, D, width=5)
d.line(682, STREAM, 712, STREAM, D, width=5)
shape(40, STREAM + 24, "(B, T, D)", D, "start")
d.text(356, STREAM + 24, "the stream: every step adds to it", size=14,
       style="font-style:italic")  # fmt: skip

# attention
arrow((45, STREAM - 4), (45, MID + 21))
step(16, MID - 17, 58, 34, "norm")
for name, y in (("q", MID - 62), ("k", MID - 15), ("v", MID + 32)):
    d.line(74, MID, 92, MID)
    arrow((92, MID), (92, y + 15), (110, y + 15))
    step(110, y, 44, 30, name, H)
shape(150, MID - 80, "(B, T, H, d)", H)
for y in (MID - 62, MID - 15):
    arrow((154, y + 15), (172, y + 15))
    step(172, y, 52, 30, "turn", T)
arrow((224, MID - 47), (322, MID - 47))
arrow((224, MID), (246, MID))
arrow((154, MID + 47), (246, MID + 47))
step(246, MID - 17, 54, 84, "cache", B)
shape(132, MID + 80, "(B, T, K, d)", H)
shape(276, MID + 84, "(B, S, K, d)", H)
arrow((300, MID), (322, MID))
arrow((300, MID + 47), (322, MID + 47))
step(322, MID - 62, 66, 129, "", ACCENT, fill=0.08)
for k, word in enumerate(("softmax", "q k / √d", "times v")):
    d.text(355, MID - 22 + 22 * k, word, size=13.5)
d.text(355, MID - 80, "attend", size=14.5, color=ACCENT, style="font-weight:600")
arrow((388, MID), (435, MID), (435, MID + 22))
step(414, MID + 22, 42, 30, "o", H)
arrow((435, MID + 52), (435, STREAM - 12))
plus(435)
d.text(205, 24, "look at the others", size=15, style="font-weight:600")

# feed-forward
arrow((497, STREAM - 4), (497, MID + 21))
step(468, MID - 17, 58, 34, "norm")
for name, y in (("gate", MID - 50), ("up", MID + 20)):
    d.line(526, MID, 540, MID)
    arrow((540, MID), (540, y + 15), (556, y + 15))
    step(556, y, 50, 30, name, D)
arrow((606, MID - 35), (671, MID - 35), (671, MID - 14))
d.text(640, MID - 47, "silu", size=13.5)
arrow((606, MID + 35), (631, MID + 35), (631, MID), (657, MID))
d.parts.append(
    f'<circle cx="671" cy="{MID}" r="12" fill="{D}" fill-opacity="0.14" '
    f'stroke="{D}" stroke-width="1.3"/>'
)
d.text(671, MID - 0.5, "×", size=17)
shape(581, MID - 68, "(B, T, F)", D)
arrow((671, MID + 12), (671, MID + 40))
step(644, MID + 40, 54, 30, "down", D)
arrow((671, MID + 70), (671, STREAM - 12))
plus(671)
d.text(584, 24, "think about it alone", size=15, style="font-weight:600")
d.save()
