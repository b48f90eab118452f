"""Whole training steps of Llama 3.2 1B, ours and the peers', from the committed CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import B, T

STEPS = data.rows("fast_step_cuda")

style.use()
fig, ax = plt.subplots(figsize=(7.2, 0.7 + 0.3 * len(STEPS)))
rates = [float(r["tokens_per_s"]) for r in STEPS]
for at, (r, rate) in enumerate(zip(STEPS, rates)):
    ax.barh(at, rate, 0.62, color=T if r["who"].startswith("ours") else B, alpha=0.8)
    words = f"{rate:,.0f} · MFU {r['MFU']} · {float(r['peak_GiB']):.1f} GiB"
    ax.text(rate + 0.01 * max(rates), at, words, va="center", fontsize=9.5)
ax.set_yticks(range(len(STEPS)), [r["who"] for r in STEPS], fontsize=9.5)
ax.set(xlabel="tokens a second", xlim=(0, 1.5 * max(rates)))
ax.set_xticks([x for x in ax.get_xticks() if x <= max(rates)])
ax.xaxis.set_major_formatter("{x:,.0f}")
ax.tick_params(axis="y", length=0)
ax.invert_yaxis()
style.save(fig, "ops_train", "Tokens a second of whole training steps, and memory")
