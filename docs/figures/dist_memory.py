"""What each GPU holds of a training step of Llama 3.1 8B, by their number."""

import matplotlib.pyplot as plt
import style
from style import B, D, T

from minllama.architecture.accounting_training import TrainingStep
from minllama.architecture.config import LlamaConfig
from minllama.dist_run.accounting import Sharding, sharded_peak

config = LlamaConfig.from_name("llama-3.1-8b")
step = TrainingStep(batch_size=2, seq_len=4096, checkpointing=True, packed=False)
NUMBERS = (1, 2, 4, 8, 16, 64)
LOOKS = (("divided: 16 bytes a weight", T, 0.85), ("borrowed: a unit or two", D, 0.85),
         ("its own rows, and their loss", B, 0.6))  # fmt: skip

style.use()
fig, ax = plt.subplots(figsize=(7.2, 3.0))
for at, n in enumerate(NUMBERS):
    _, parts = sharded_peak(config, step, Sharding(ranks=n))
    divided = parts["slices"] + parts["optimizer"] + parts["gradients of slices"]
    borrowed = sum(
        v for k, v in parts.items() if "gathered" in k or "on their way" in k
    )
    rest = sum(parts.values()) - divided - borrowed
    bottom = 0.0
    for size, (what, color, alpha) in zip((divided, borrowed, rest), LOOKS):
        ax.bar(at, size / 1e9, 0.62, bottom=bottom, color=color, alpha=alpha, lw=0,
               label=None if at else what)  # fmt: skip
        bottom += size / 1e9
    beside = 60 < bottom < 80  # or the line would cross it
    x, y = (at + 0.36, bottom - 5) if beside else (at, bottom + 2)
    ax.text(x, y, f"{bottom:.0f}", ha="left" if beside else "center", va="bottom")
ax.axhline(80, color=style.INK, ls="--", lw=1)
ax.text(5.45, 82, "a GPU of 80 GB", ha="right", va="bottom")
ax.set(xticks=range(len(NUMBERS)), xticklabels=NUMBERS, xlabel="GPUs")
ax.set(ylabel="GB on each", ylim=(0, 180))
ax.legend(loc="upper right")
style.save(fig, "dist_memory", "Gigabytes on each GPU, by the number of GPUs")
