"""Where each method puts what it trains."""

import style
from style import ACCENT, B, D, H, T

d = style.Drawing("peft_places", "A block, and what each method trains in it", 720, 326)

PARTS = [
    (10, 74, "embed", ("prompt", "P-tuning", "tokens", "(LoRA)")),
    (100, 54, "norm", ("norms",)),
    (164, 84, "q, k, v", ("LoRA", "DoRA", "VeRA …", "IA3: k, v", "biases")),
    (258, 88, "attention", ("prefix", "LLaMA-", "Adapter")),
    (356, 44, "o", ("LoRA …", "Houlsby,", "behind it")),
    (412, 54, "norm", ("norms",)),
    (476, 76, "gate, up", ("LoRA …", "biases")),
    (562, 60, "down", ("LoRA …", "IA3: input", "Houlsby,", "behind it")),
    (640, 70, "head", ("(LoRA)", "tokens")),
]
COLORS = {"LoRA": D, "tokens": D, "(LoRA)": D, "LoRA …": D, "DoRA": D, "VeRA …": D,
          "norms": H, "IA3: k, v": H, "IA3: input": H, "biases": H}  # fmt: skip
INSIDE = {"prefix", "LLaMA-", "Adapter", "prompt", "P-tuning"}
d.box(92, 34, 538, 96, color=B, fill=0.04)
d.text(361, 22, "a block, N times", size=13, style="font-style:italic")
for (x, w, name, words), after in zip(PARTS, [*PARTS[1:], None]):
    d.box(x, 58, w, 48, name, color=B, fill=0.25, size=14)
    if after:
        d.line(x + w + 1, 82, after[0] - 1, 82)
    d.line(x + w / 2, 108, x + w / 2, 150, dashed=True)
    for at, word in enumerate(words):
        color = COLORS.get(word, T if word in INSIDE else ACCENT)
        d.text(x + w / 2, 164 + 20 * at, word, size=14, color=color)
LEGEND = [
    ("merges:", 60, [(D, "a change of a weight"), (H, "factors, sums")]),
    ("cannot merge:", 380, [(T, "something to read"), (ACCENT, "a small network")]),
]
for head, x, entries in LEGEND:
    d.text(x + 94, 288, head, size=14, anchor="end", style="font-weight:600")
    for at, (color, words) in enumerate(entries):
        y = 281 + 24 * at
        d.box(x + 104, y, 14, 14, color=color, fill=0.5)
        d.text(x + 124, y + 7, words, size=14, anchor="start")
d.save()
