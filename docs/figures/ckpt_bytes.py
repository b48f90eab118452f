"""The bytes of a checkpoint of Llama 3.1 8B, whole and for each of several ranks."""

import matplotlib.pyplot as plt
import style
from style import B, D, H, T

from minllama.architecture.accounting import count_parameters
from minllama.architecture.config import LlamaConfig

P = count_parameters(LlamaConfig.from_name("llama-3.1-8b"))
PARTS = [("weights, float32", T), ("mean of gradients", D), ("mean of squares", H)]

style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.3))
rows = [("to generate with", 1, [2])]
rows += [(f"saved by {n} rank{'s' * (n > 1)}, each", n, [4, 4, 4]) for n in (1, 4, 64)]
for at, (_, ranks, sizes) in enumerate(rows):
    left = 0.0
    for size, (name, color) in zip(sizes, PARTS):
        wide = size * P / ranks / 1e9
        label = name if at == 1 else None
        ax.barh(at, wide, 0.62, left=left, color=color if at else B, label=label)
        left += wide
    ax.text(left + 1, at, f"{left:.1f} GB", va="center")
ax.set(yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
ax.set(xlabel="GB", xlim=(0, 112))
ax.tick_params(axis="y", length=0)
ax.invert_yaxis()
ax.legend(loc="lower right")
style.save(fig, "ckpt_bytes", "Bytes of a checkpoint of Llama 3.1 8B")
