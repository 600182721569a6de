"""Draws docs/picture.svg: one head of `rel_attention`, coloured by distance.

python docs/picture.py
"""

from __future__ import annotations

import colorsys
from pathlib import Path

TQ, TM = 6, 8  # queries, memory keys
TK = TM + TQ
CELL = 30
LEFT, TOP = 150, 92  # of the matrix of scores
TABLE_X = LEFT + TK * CELL + 130
TILE_ROWS, TILE_KEYS = (2, 4), (5, 10)
WIDTH, HEIGHT = TABLE_X + 250, TOP + TK * 19 + 30
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"


def main() -> None:
    parts = [*labels(), *scores(), *table(), *tile(), *arrow()]
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' "
        f"width='{WIDTH}' height='{HEIGHT}' {FONT}>\n"
        "<title>Attention over [memory; segment] with relative positions: every diagonal of scores "
        "reads one row of r; only one tile of them exists at a time.</title>\n"
        f"<rect width='{WIDTH}' height='{HEIGHT}' rx='8' fill='#ffffff'/>"
    )
    Path(__file__).with_suffix(".svg").write_text("\n".join([head, *parts, "</svg>\n"]))


def labels() -> list[str]:
    border = LEFT + TM * CELL
    right = LEFT + TK * CELL
    keys_y, span_y = TOP - 14, TOP - 44
    return [
        text(LEFT + TM * CELL / 2, span_y, "memory: read in place", weight="bold"),
        text(border + TQ * CELL / 2, span_y, "segment", weight="bold"),
        line(LEFT + 2, span_y + 10, border - 4, span_y + 10),
        line(border + 4, span_y + 10, right - 2, span_y + 10),
        text(LEFT + TK * CELL / 2, keys_y, "keys and values j", size=12),
        text(LEFT - 12, TOP + TQ * CELL / 2 - 3, "queries i", size=12, anchor="end"),
        text(LEFT - 12, TOP + TQ * CELL / 2 + 14, "(segment only)", size=12, anchor="end"),
    ]


def scores() -> list[str]:
    """The cells, those of one distance in one colour; none where the key is in the future."""
    cells = []
    for i in range(TQ):
        for j in range(TK):
            distance = i + TM - j
            x, y = LEFT + j * CELL, TOP + i * CELL
            if distance < 0:
                cells.append(box(x, y, CELL, CELL, "#f4f4f4"))
                continue
            cells.append(box(x, y, CELL, CELL, color(distance)))
            cells.append(text(x + CELL / 2, y + CELL / 2 + 4, str(distance), size=11))
    return cells


def table() -> list[str]:
    rows = [text(TABLE_X + 55, TOP - 14, "r, a row per distance", weight="bold")]
    for m in range(TK):
        distance = TK - 1 - m
        y = TOP + m * 19
        rows.append(box(TABLE_X, y, 110, 19, color(distance)))
        rows.append(text(TABLE_X + 55, y + 14, str(distance), size=11))
        if m in (0, TK - 1):
            rows.append(text(TABLE_X + 118, y + 14, f"row {m}", size=11, anchor="start"))
    return rows


def tile() -> list[str]:
    """The block of scores that exists at one moment, and what happens in it."""
    (a, b), (c, d) = TILE_ROWS, TILE_KEYS
    x, y = LEFT + c * CELL, TOP + a * CELL
    below = TOP + TQ * CELL
    lines = (
        "Per thread, one tile of scores exists at a time:",
        "q·k, and q·r written through a skewed row stride",
        "(that is the relative shift); softmax against a running",
        "maximum; product with v. Backward computes it again.",
    )
    return [
        f"<rect x='{x}' y='{y}' width='{(d - c) * CELL}' height='{(b - a) * CELL}' "
        "fill='none' stroke='#111111' stroke-width='3'/>",
        line(x + 2 * CELL, y + (b - a) * CELL, x + 2 * CELL, below + 14, color="#111111"),
        *(text(LEFT, below + 32 + 19 * n, words, anchor="start") for n, words in enumerate(lines)),
    ]


def arrow() -> list[str]:
    """From a row of r to the diagonal that reads it."""
    distance = 0
    y = TOP + (TK - 1 - distance) * 19 + 10
    x1, y1 = LEFT + TK * CELL + 4, TOP + (TQ - 1) * CELL + CELL / 2
    return [
        f"<path d='M {TABLE_X - 4} {y} C {TABLE_X - 60} {y}, {x1 + 70} {y1}, {x1} {y1}' "
        "fill='none' stroke='#555555' stroke-width='1.5'/>",
        f"<path d='M {x1} {y1} l 9 -5 l 0 10 z' fill='#555555'/>",
        text((x1 + TABLE_X) / 2 - 2, y1 - 24, "a row of r serves", size=11),
        text((x1 + TABLE_X) / 2 - 2, y1 - 10, "a whole diagonal", size=11),
    ]


def color(distance: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(0.62 - 0.55 * distance / (TK - 1), 0.84, 0.6)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    size = f"width='{width}' height='{height}'"
    return f"<rect x='{x}' y='{y}' {size} fill='{fill}' stroke='#ffffff'/>"


def line(x1: float, y1: float, x2: float, y2: float, color: str = "#888888") -> str:
    return f"<path d='M {x1} {y1} L {x2} {y2}' stroke='{color}' stroke-width='1.5'/>"


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 13,
    anchor: str = "middle",
    weight: str = "normal",
) -> str:
    style = f"font-size='{size}' text-anchor='{anchor}' font-weight='{weight}'"
    return f"<text x='{x}' y='{y}' {style} fill='#222222'>{words}</text>"


if __name__ == "__main__":
    main()
