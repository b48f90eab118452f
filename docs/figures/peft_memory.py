"""Bytes of a training step by method, for Llama 3.2 1B and 3.1 8B, from the package."""

import matplotlib.pyplot as plt
import style
from style import ACCENT, B, D, T

from minllama.peft import memory_table

PARTS = {"weights": B, "gradients": D, "optimizer": ACCENT, "activations": T}
MODELS = {"llama-3.2-1b": "Llama 3.2 1B", "llama-3.1-8b": "Llama 3.1 8B"}
NAMES = {"full": "full", "lora": "LoRA", "dora": "DoRA", "ia3": "IA3"}
table = memory_table()

style.use()
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
for ax, (model, title) in zip(axes, MODELS.items()):
    rows = [row for row in table if row["model"] == model]
    names = [NAMES.get(row["method"], row["method"]) for row in rows]
    left = [0.0] * len(rows)
    for part, color in PARTS.items():
        sizes = [row[part] / 1e9 for row in rows]
        ax.barh(names, sizes, 0.66, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, sizes)]
    for at, total in enumerate(left):
        ax.text(total + 0.015 * max(left), at, f"{total:.1f}", va="center")
    ax.set(title=title, xlabel="GB", xlim=(0, 1.18 * max(left)))
    ax.tick_params(axis="y", length=0)
axes[0].invert_yaxis()
axes[1].legend(loc="lower right", handlelength=1)
style.save(fig, "peft_memory", "Gigabytes of a training step by method and by part")
