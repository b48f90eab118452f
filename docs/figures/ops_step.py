"""What is no matrix product in a training step of Llama 3.2 1B, plain and fused."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, D, H, T, V

from minllama.architecture.accounting import count_parameters
from minllama.architecture.config import LlamaConfig

flops = 6 * 16384 * count_parameters(LlamaConfig.from_name("llama-3.2-1b"))
products = 1e3 * flops / data.HEAD
COLORS = [T, "#56B4E9", H, D, V]

style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.2))
for at, who in enumerate(("eager", "ours")):
    ax.barh(at, products, 0.58, color=B, alpha=0.45, label="" if at else "products")
    left = products
    for (op, shape, n), color in zip(data.STEP, COLORS):
        ms = n * data.microseconds(op, who, shape) / 1e3
        ax.barh(at, ms, 0.58, left, color=color, label="" if at else op)
        left += ms
    ax.text(
        left + 4, at, f"{100 * (left - products) / products:.0f} % more", va="center"
    )
ax.set(yticks=[0, 1], yticklabels=["plain", "kernels"], xlabel="ms a step")
ax.set(xlim=(0, 1.25 * ax.get_xlim()[1]))
ax.invert_yaxis()
ax.tick_params(axis="y", length=0)
fig.legend(loc="outside upper center", ncols=6, fontsize=9.5, columnspacing=1.0,
           handlelength=1.2)  # fmt: skip
style.save(fig, "ops_step", "Milliseconds a step: products, and what is none")
