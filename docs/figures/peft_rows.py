"""One batch, one base, an adapter for each row."""

import style
from style import B, D, H, T, V

d = style.Drawing("peft_rows", "Each row of a batch takes its own adapter", 660, 214)

ROWS = [("pirate", D), ("spoon", H), ("no adapter", B), ("pirate", D)]
d.text(215, 18, "one product for all rows", size=14, style="font-weight:600")
d.text(470, 18, "each row its own", size=14, style="font-weight:600")
d.box(150, 38, 72, 152, "W", color=B, fill=0.25, size=18)
for at, (name, color) in enumerate(ROWS):
    y = 38 + 40 * at
    d.box(18, y, 64, 32, f"y{at}", color=V, fill=0.2, size=14)
    d.text(114, y + 16, "=", size=17)
    d.box(230, y, 64, 32, f"x{at}", color=T, fill=0.2, size=14)
    if color != B:
        d.text(330, y + 16, "+", size=17)
        d.box(364, y, 10, 32, color=color, fill=0.55)
        d.box(382, y + 11, 62, 10, color=color, fill=0.55)
        d.box(452, y, 64, 32, f"x{at}", color=T, fill=0.2, size=14)
    d.text(534, y + 16, name, size=14, anchor="start", style="font-style:italic")
d.text(369, 200, "B", size=13)
d.text(413, 200, "A", size=13)
d.save()
