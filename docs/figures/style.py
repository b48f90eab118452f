"""The look of every figure: one ink, one colour per dimension, at most 720 x 360.

    import style
    style.use()                                   # then plot with matplotlib as ever
    style.save(fig, "lora_memory", "Bars: bytes per parameter")

    d = style.Drawing("lora", "Two thin matrices", height=240)
    d.box(40, 40, 160, 120, "W", color=style.D)   # pixels, y grows downwards
    d.save()

Ink becomes `currentColor`, the ground stays transparent: the figure follows the page
that it is drawn into, light or dark. Run a script beside its SVG and commit both.
"""

import html
import sys
from pathlib import Path

INK = "#5b606b"  # as drawn in a notebook; readable on white and on black
T, D, H, V, B = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8A8A8A"
ACCENT = "#D55E00"
WIDTH, HEIGHT = 720, 360
SANS = "'Source Sans 3', 'Helvetica Neue', Arial, sans-serif"
MONO = "'JetBrains Mono', Menlo, Consolas, monospace"
ALONE = (  # outside of a page the ink follows the system; inside, nothing matches
    "<style>svg:root{color:#23262b}"
    "@media (prefers-color-scheme:dark){svg:root{color:#d6d3cc}}</style>"
)


def use() -> None:
    """Set matplotlib's defaults."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH / 96, 300 / 96),
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "axes.facecolor": "none",
            "figure.constrained_layout.use": True,
            "svg.fonttype": "none",
            "svg.hashsalt": "minllama",
            "font.family": "DejaVu Sans",  # to measure with; `save` writes SANS
            "font.size": 10.5,
            "axes.titlesize": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.prop_cycle": plt.cycler(color=[T, ACCENT, H, V, D, B]),
            "lines.linewidth": 1.8,
            "grid.linewidth": 0.5,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "hatch.linewidth": 0.6,
        }
    )
    for name in ["text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"]:
        plt.rcParams[name] = INK
    for name in ["xtick.color", "ytick.color", "grid.color", "hatch.color"]:
        plt.rcParams[name] = INK


def save(fig, name: str, title: str) -> Path:
    """Write a matplotlib figure as SVG beside the script that runs.

    `title` tells those who cannot see it what is drawn.
    """
    from io import StringIO

    width, height = fig.get_size_inches() * 96
    if round(width) > WIDTH or round(height) > HEIGHT:
        raise ValueError(
            f"figure of {width:.0f} x {height:.0f} px is larger than {WIDTH} x "
            f"{HEIGHT}; make figsize smaller (96 px to the inch)."
        )
    fig.savefig(text := StringIO(), format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.replace("'DejaVu Sans'", SANS).split(">", 1)
    return _write(name, f"{head}>{ALONE}<title>{html.escape(title)}</title>{body}")


class Drawing:
    """A picture of boxes, words and arrows, in pixels."""

    def __init__(self, name: str, title: str, width=WIDTH, height=HEIGHT) -> None:
        if width > WIDTH or height > HEIGHT:
            raise ValueError(
                f"{width} x {height} px is larger than {WIDTH} x {HEIGHT}."
            )
        self.name, self.title, self.width, self.height = name, title, width, height
        self.parts: list[str] = []

    def box(self, x, y, w, h, label="", color=INK, fill=0.12, size=15, **text) -> None:
        """A rectangle with its top left corner at x, y, and a label in its middle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" '
            f'fill="{color}" fill-opacity="{fill:g}" stroke="{color}" '
            f'stroke-width="1.3"/>'
        )
        if label:
            self.text(x + w / 2, y + h / 2, label, size=size, **text)

    def text(
        self, x, y, words, size=15, color=INK, anchor="middle", font=SANS, style=""
    ) -> None:
        """Words centred on the height y; `anchor` is start, middle or end."""
        looks = f' style="{style}"' if style else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size:g}" '
            f'fill="{color}" text-anchor="{anchor}" font-family="{font}"{looks}>'
            f"{html.escape(words)}</text>"
        )

    def line(
        self, x1, y1, x2, y2, color=INK, arrow=False, dashed=False, width=1.3
    ) -> None:
        """A straight line, with an arrow head at its end if `arrow`."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{color}" '
            f'stroke-width="{width:g}" fill="none"{dash}/>'
        )
        if arrow:
            length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
            ux, uy = (x2 - x1) / length, (y2 - y1) / length
            bx, by = x2 - 8 * ux, y2 - 8 * uy
            self.parts.append(
                f'<path d="M{x2:g} {y2:g}L{bx - 3.5 * uy:.1f} {by + 3.5 * ux:.1f}'
                f'L{bx + 3.5 * uy:.1f} {by - 3.5 * ux:.1f}Z" fill="{color}"/>'
            )

    def save(self) -> Path:
        """Write it as SVG beside the script that runs."""
        size = f'width="{self.width}" height="{self.height}"'
        view = f'viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>'
        title = f"<title>{html.escape(self.title)}</title>"
        return _write(
            self.name, "\n".join([head + ALONE, title, *self.parts, "</svg>"])
        )


def _write(name: str, svg: str) -> Path:
    file = Path(sys.argv[0]).resolve().parent / f"{name}.svg"
    file.write_text(svg.replace(INK, "currentColor").rstrip() + "\n")
    print(f"{file.name}: {file.stat().st_size / 1000:.1f} kB")
    return file
