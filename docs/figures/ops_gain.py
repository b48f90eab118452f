"""What counting bytes predicts of fusing, and what was measured, from the CSV."""

import matplotlib.pyplot as plt
import ops_measured as data
import style
from style import T

# Bytes a number, forward, step by step as the reference is written (bfloat16 in and
# out, float32 between), and at the least; the page has the same table.
BYTES = {
    "swiglu 16384x8192": (10, 6),
    "add_rms_norm 16384x4096": (46, 8),
    "rope 8x2048x(32+8)x64": (26, 4),
    "cross_entropy 8192x128256": (14, 2),
    "rms_norm 16384x4096": (40, 4),
    "softmax 16384x4096": (44, 4),
}

style.use()
fig, ax = plt.subplots(figsize=(7.2, 2.3))
most = 0.0
for at, (case, (apart, least)) in enumerate(BYTES.items()):
    op, shape = case.split()
    times = [data.microseconds(op, who, shape, "forward") for who in ("eager", "ours")]
    gain = times[0] / times[1]
    most = max(most, gain, apart / least)
    ax.barh(at, gain, 0.55, color=T, alpha=0.8)
    ax.plot([apart / least] * 2, [at - 0.4, at + 0.4], color=style.INK, lw=2.2)
    ax.text(max(gain, apart / least) + 0.2, at, f"{gain:.1f}", va="center")
ax.plot(
    [], [], color=style.INK, lw=2.2, label="predicted: bytes apart / bytes at least"
)
ax.plot([], [], color=T, lw=6, alpha=0.8, label="measured: time plain / time fused")
ax.set_yticks(range(len(BYTES)), [case.split()[0] for case in BYTES])
ax.set(xlabel="times as fast, forward", xlim=(0, 1.12 * most))
ax.tick_params(axis="y", length=0)
ax.invert_yaxis()
fig.legend(loc="outside upper center", ncols=2)
style.save(fig, "ops_gain", "Gain of fusing, predicted from bytes and measured")
