"""Positions as a clock: equal distances are equal angles, and there are many hands."""

import math

import style
from style import ACCENT, T

d = style.Drawing("arch_clock", "Clock faces: rotary positions", 720, 318)


def face(x, y, r, color=style.INK) -> None:
    d.parts.append(
        f'<circle cx="{x}" cy="{y}" r="{r}" fill="none" stroke="{color}" '
        f'stroke-width="1.2" stroke-opacity="0.6"/>'
    )


def hand(x, y, length, hours, color, width=2.6) -> tuple[float, float]:
    angle = 2 * math.pi * hours / 12
    end = x + length * math.sin(angle), y - length * math.cos(angle)
    d.line(x, y, *end, color=color, width=width)
    return end


def between(x, y, r, first, last) -> None:
    """An arc from one hour to another."""
    points = []
    for hours in (first, last):
        angle = 2 * math.pi * hours / 12
        points.append((x + r * math.sin(angle), y - r * math.cos(angle)))
    (x1, y1), (x2, y2) = points
    d.parts.append(
        f'<path d="M{x1:.1f} {y1:.1f}A{r} {r} 0 0 1 {x2:.1f} {y2:.1f}" fill="none" '
        f'stroke="{style.INK}" stroke-width="1.6"/>'
    )


R, Y = 72, 124
for x, key, query in ((88, 1, 3), (280, 7, 9)):
    face(x, Y, R)
    for hour in range(12):
        angle = 2 * math.pi * hour / 12
        sx, sy = math.sin(angle), -math.cos(angle)
        d.line(x + (R - 5) * sx, Y + (R - 5) * sy, x + R * sx, Y + R * sy)
    between(x, Y, 24, key, query)
    for hours, color, name in ((key, T, "k"), (query, ACCENT, "q")):
        ex, ey = hand(x, Y, R - 24, hours, color)
        near = 1.24  # the letter stands before the tip of its hand
        d.text(x + near * (ex - x), Y + near * (ey - Y), name, color=color, size=15,
               style="font-weight:600")  # fmt: skip
    d.text(x, Y + R + 24, f"key at {key}, query at {query}", size=14.5)
d.text(184, Y, "=", size=26)
d.text(184, 24, "two tokens apart, the same score", size=15, style="font-weight:600")
d.text(184, Y + R + 62, "a turn of both changes nothing between them:", size=14)
d.text(184, Y + R + 84, "only the distance is left", size=14)

turns = [2 * math.pi * 10_000 ** (2 * i / 8) for i in range(4)]
d.text(556, 24, "d / 2 hands, each slower", size=15, style="font-weight:600")
for row, position in enumerate((1, 10, 100)):
    y = 74 + 66 * row
    d.text(422, y, f"at {position}", size=14.5, anchor="end")
    for column, turn in enumerate(turns):
        x = 462 + 66 * column
        face(x, y, 26)
        hand(x, y, 22, 12 * position / turn, T, width=2.4)
d.text(424, 248, "a turn in", size=13, anchor="end", style="font-style:italic")
for column, turn in enumerate(turns):
    words = f"{turn:,.0f}" if turn > 9 else f"{turn:.1f}"
    d.text(462 + 66 * column, 248, words, size=14)
d.text(561, 270, "tokens", size=14)
d.save()
