"""Where each method puts what it trains."""

import style
from style import ACCENT, B, D, H, T

d = style.Drawing("peft_places", "A block, and what each method trains in it", 720, 318)

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
d.box(92, 284, 14, 14, color=D, fill=0.5)
d.text(112, 291, "a change of a weight", size=13, anchor="start")
d.box(262, 284, 14, 14, color=H, fill=0.5)
d.text(282, 291, "factors, sums", size=13, anchor="start")
d.box(392, 284, 14, 14, color=T, fill=0.5)
d.text(412, 291, "something to read", size=13, anchor="start")
d.box(546, 284, 14, 14, color=ACCENT, fill=0.5)
d.text(566, 291, "a small network", size=13, anchor="start")
d.save()
