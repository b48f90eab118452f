"""What one of four processes keeps, for each way of dividing."""

import style
from style import B, T

d = style.Drawing("dist_slices", "What one of four processes keeps", 720, 330)
COLUMNS = ["weights", "gradients", "Adam", "rows of text", "tokens of a row", "layers"]
# Of each column, rank 0 keeps: 1 all, 4 a fourth
WAYS = [
    ("data parallel", [1, 1, 1, 4, 1, 1]),
    ("FSDP", [4, 4, 4, 4, 1, 1]),
    ("tensor parallel", [4, 4, 4, 1, 1, 1]),
    ("… with sequence", [4, 4, 4, 1, 4, 1]),
    ("context parallel", [1, 1, 1, 1, 4, 1]),
    ("pipeline", [4, 4, 4, 1, 1, 4]),
]
LEFT, STEP, CELL, TOP = 146, 96, 19, 62
for column, name in enumerate(COLUMNS):
    d.text(LEFT + column * STEP + 2 * CELL, 34, name, size=13)
for line, (way, parts) in enumerate(WAYS):
    y = TOP + line * 43
    d.text(LEFT - 16, y + 11, way, size=14, anchor="end", style="font-weight:600")
    for column, part in enumerate(parts):
        x = LEFT + column * STEP
        for piece in range(4):
            mine = part == 1 or piece == 0
            d.box(x + piece * CELL, y, CELL, 22, color=T if mine else B,
                  fill=0.45 if mine else 0.0)  # fmt: skip
d.save()
