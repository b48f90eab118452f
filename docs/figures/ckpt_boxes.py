"""Four files, read by two ranks and by three: each band is what both have in common."""

import style
from style import B, D, H, T, V

ROWS, TOP, TALL, GAP = 24, 62, 8.6, 10  # pixels of a row, and between two files
COLORS = [T, D, H, V]
d = style.Drawing("ckpt_boxes", "Which ranks read which rows of which file", 720, 320)


def places(world) -> list[tuple[int, int, float]]:
    """Of each rank its first row, its last, and where in the picture it begins."""
    length = -(-ROWS // world)
    starts = [min(rank * length, ROWS) for rank in range(world + 1)]
    top = TOP + GAP * (4 - world) / 2
    return [
        (a, b, top + TALL * a + GAP * rank)
        for rank, (a, b) in enumerate(zip(starts, starts[1:]))
    ]


def band(x1, top1, x2, top2, rows, color) -> None:
    """A strip of so many rows from one place to another."""
    tall = TALL * rows
    d.parts.append(
        f'<path d="M{x1:g} {top1:.1f}L{x2:g} {top2:.1f}L{x2:g} {top2 + tall:.1f}'
        f'L{x1:g} {top1 + tall:.1f}Z" fill="{color}" fill-opacity="0.28"/>'
    )


def readers(x, towards, world) -> None:
    """The ranks that read, and their bands from the files in the middle."""
    for rank, (first, last, top) in enumerate(places(world)):
        d.box(x, top, 84, TALL * (last - first), f"rank {rank}", color=B, size=14)
        for file, (start, stop, at) in enumerate(places(4)):
            a, b = max(first, start), min(last, stop)
            if a < b:
                left = (towards, at + TALL * (a - start))
                right = (x + 84 * (x < towards), top + TALL * (a - first))
                band(*left, *right, b - a, COLORS[file])
    d.text(x + 42, 40, f"read by {world}", size=15, style="font-weight:600")


readers(24, 256, 2)
readers(612, 464, 3)
for file, (first, last, top) in enumerate(places(4)):
    name = f"model-0000{file}-of-00004"
    d.box(256, top, 208, TALL * (last - first), name, color=COLORS[file], fill=0.3,
          size=12.5, font=style.MONO)  # fmt: skip
d.text(360, 20, "one matrix of 24 rows", size=14)
d.text(360, 40, "written by 4 ranks", size=15, style="font-weight:600")
d.text(66, 308, "two whole files each", size=13.5)
d.text(648, 308, "two files each", size=13.5)
d.save()
