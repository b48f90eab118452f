"""FSDP: while a block computes, the slices of the next are on their way."""

import style
from style import ACCENT, B, D, T

d = style.Drawing(
    "dist_borrow", "FSDP's timetable: three blocks, there and back", 720, 262
)
UNIT, LEFT = 46, 96
NETWORK, COMPUTE, HELD = 60, 108, 156
steps = [("0", 1), ("1", 1), ("2", 1), ("2", 2.4), ("1", 2.4), ("0", 2.4)]
x, starts = LEFT + 0.8 * UNIT, []
for index, (block, length) in enumerate(steps):
    starts.append(x)
    fill = 0.32 if index < 3 else 0.5
    d.box(x, COMPUTE, length * UNIT, 32, block, color=T, fill=fill, size=14)
    x += length * UNIT + 6
end = x
for index, (block, _) in enumerate(steps):  # gathers: one step ahead
    if index == 3:
        continue  # block 2 is still here
    at = LEFT if index == 0 else starts[index - 1]
    d.box(at, NETWORK, 0.72 * UNIT, 32, block, color=D, fill=0.32, size=14)
for index in (3, 4, 5):  # scatters
    at = starts[index] + steps[index][1] * UNIT + 6
    if index < 5:
        at = max(at, starts[index] + 0.8 * UNIT) + (0.78 * UNIT if index < 4 else 0)
    block = steps[index][0]
    d.box(at, NETWORK, 0.9 * UNIT, 32, block, color=ACCENT, fill=0.28, size=14)
for name, y in (("network", NETWORK), ("compute", COMPUTE)):
    d.text(LEFT - 12, y + 16, name, size=14, anchor="end", style="font-weight:600")
d.text(LEFT - 12, HELD + 16, "whole", size=14, anchor="end", style="font-weight:600")
for index, (_, length) in enumerate(steps):
    begin = LEFT if index == 0 else starts[index - 1]
    if index == 3:
        continue
    stop = starts[index] + length * UNIT
    if index == 2:  # kept from its forward pass until its backward pass
        stop = starts[3] + steps[3][1] * UNIT
    y = HELD + 14 * (index in (1, 4))
    d.line(begin, y + 9, stop, y + 9, B, width=5)
middle = starts[3] - 3
d.line(middle, 40, middle, 200, dashed=True)
d.text(middle - 10, 30, "forward", size=14, anchor="end", style="font-style:italic")
d.text(middle + 10, 30, "backward", size=14, anchor="start", style="font-style:italic")
for at, color, words in ((96, D, "all-gather"), (236, ACCENT, "reduce-scatter"),
                         (410, B, "a block is whole: two at most")):  # fmt: skip
    d.box(at, 224, 14, 14, color=color, fill=0.4)
    d.text(at + 22, 231, words, size=13.5, anchor="start")
d.save()
