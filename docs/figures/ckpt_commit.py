"""The steps of a save, what lies on the disk at each, and what is in force."""

import style
from style import ACCENT, B, H, T

d = style.Drawing("ckpt_commit", "A save, and what is in force at each step", 720, 330)
STEPS = [
    ("while staging", "copied to memory", []),
    ("before writing", "an empty folder", []),
    ("within a file", "files are growing", [0.55, 0.35]),
    ("between files", "some are whole", [1, 0.4]),
    ("before the rename", "manifest, last", [1, 1, "m"]),
    ("after the rename", "the same files", [1, 1, "m"]),
]
W, LEFT = 116, 12
RENAME = LEFT + 5 * W - 4

for number, (name, words, files) in enumerate(STEPS):
    x = LEFT + number * W
    d.text(x + 54, 24, name, size=12.5, style="font-weight:600")
    d.text(x + 54, 178, words, size=12.5)
    done = number == 5
    if number:
        label = "step-200" if done else ".saving-200"
        d.box(x + 3, 44, 102, 118, color=H if done else B, fill=0.1)
        d.text(x + 54, 58, label, size=11.5, font=style.MONO)
    else:
        d.box(x + 3, 72, 102, 62, "pieces in RAM", color=B, fill=0.0, size=13)
    for row, part in enumerate(files):
        y = 72 + 29 * row
        if part == "m":
            d.box(x + 14, y, 80, 22, "manifest", color=H, fill=0.3, size=12.5)
            continue
        d.box(x + 14, y, 80, 22, color=T, fill=0)
        d.box(x + 14, y, 80 * part, 22, color=T, fill=0.3)
        d.text(x + 54, y + 11, f"rank {row}", size=12.5)

d.box(LEFT, 208, RENAME - LEFT - 4, 34, "in force: step-100", color=B, fill=0.22)
d.box(RENAME + 4, 208, 704 - RENAME, 34, "step-200", color=H, fill=0.4)
d.line(RENAME, 36, RENAME, 262, ACCENT, dashed=True, width=1.6)
d.text(RENAME, 276, "the rename: at once, or not at all", size=13.5, color=ACCENT,
       anchor="end")  # fmt: skip
d.text(LEFT, 276, "killed here: the next save removes it", size=13.5, anchor="start")
d.line(LEFT, 300, LEFT + W - 12, 300, ACCENT, width=3)
d.text(LEFT, 316, "training waits", size=13, color=ACCENT, anchor="start")
d.line(LEFT + W, 300, 708, 300, B, width=3)
d.text(LEFT + W, 316, "async_save: beside training", size=13, anchor="start")
d.save()
