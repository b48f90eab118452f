"""Where the parameters of a Llama are, by model; counted from the configs."""

import matplotlib.pyplot as plt
import style
from style import B, D, H, V

from minllama.architecture.accounting import parameters_by_part
from minllama.architecture.config import LlamaConfig
from minllama.architecture.weights import open_weights

NAMES = ["stories", "llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"]
KINDS = {"embedding": V, "head": V, "attention": H, "feed-forward": D, "norms": B}

style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.9))
for row, name in enumerate(NAMES):
    config = open_weights(name).config if row == 0 else LlamaConfig.from_name(name)
    parts = parameters_by_part(config)
    total, left = sum(parts.values()), 0.0
    for kind, color in KINDS.items():
        share = parts[kind] / total
        alpha = 0.55 if kind == "head" else 0.9
        ax.barh(row, share, 0.66, left, color=color, alpha=alpha)
        if share > 0.035:
            ax.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center",
                    color="#000000", fontsize=9.5)  # fmt: skip
        left += share
    millions = f"{total / 1e6:.1f} M" if total < 1e9 else f"{total / 1e9:.2f} B"
    ax.text(1.015, row, millions, va="center")
ax.set(xlim=(0, 1), yticks=range(len(NAMES)), yticklabels=NAMES, xticks=[])
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
ax.invert_yaxis()
words = ["embedding", "head, if not tied", "attention", "feed-forward"]
for x, word, kind in zip((0.0, 0.22, 0.5, 0.7), words, KINDS):
    ax.text(x, -0.72, "■", color=KINDS[kind], alpha=0.55 if kind == "head" else 0.9)
    ax.text(x + 0.03, -0.72, word)
style.save(fig, "arch_parameters", "Shares of the parameters in five Llamas")
