"""The star of imports: each chapter imports the hub, none imports another."""

import math

import style

CHAPTERS = [  # clockwise from the top
    ("peft", -90),
    ("long_context", -47),
    ("large_vocab", -13),
    ("quantize", 13),
    ("fast_ops", 47),
    ("inference", 90),
    ("ssm", 133),
    ("vision", 167),
    ("dist_checkpoint", 193),
    ("dist_run", 227),
]

d = style.Drawing("star", "Ten chapters around the hub, an arrow from each to it")
x, y = 360, 206
for name, degrees in CHAPTERS:
    angle = math.radians(degrees)
    cx, cy = x + 270 * math.cos(angle), y + 128 * math.sin(angle)
    w = 9.0 * len(name) + 26
    reach = 1 / max(abs(cx - x) / 104, abs(cy - y) / 32)  # to the border of the hub
    away = 1 / max(abs(cx - x) / (w / 2 + 6), abs(cy - y) / 21)
    d.line(
        cx - away * (cx - x),
        cy - away * (cy - y),
        x + reach * (cx - x),
        y + reach * (cy - y),
        arrow=True,
    )
    d.box(cx - w / 2, cy - 15, w, 30, name, font=style.MONO, size=14, fill=0.05)
d.box(x - 98, y - 26, 196, 52, "architecture", style.ACCENT, font=style.MONO, size=17)
above = "recipes · cli · examples · notebooks · tests · benchmarks"
d.text(360, 16, above, size=15)
d.text(
    360, 36, "above the star, free to import all of it", size=13.5, style="opacity:.7"
)
d.line(60, 52, 660, 52, dashed=True, width=1)
d.save()
