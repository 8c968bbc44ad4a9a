"""Pictures of what a model of images draws."""

from pathlib import Path

import numpy as np

_COLUMNS, _TILE = 8, 96  # images in a row, and about how many pixels each gets on a side
_GAP, _MARGIN, _CAPTION = 4, 12, 26  # pixels


def draw_images(path: Path, parts: dict[str, np.ndarray], *, levels: int) -> None:
    """Draws rows of images under captions, every pixel as a square of whole pixels.

    Args:
      path: the picture, .png.
      parts: by caption, integers [count, Y, X, 1 or 3] below `levels`; 0 is black.
    """
    from matplotlib.figure import Figure

    height, width = next(iter(parts.values())).shape[1:3]
    scale = max(1, _TILE // max(height, width))
    row, column = height * scale + _GAP, width * scale + _GAP
    columns = min(_COLUMNS, max(map(len, parts.values())))
    rows = {caption: -(-len(images) // columns) for caption, images in parts.items()}
    size = (
        2 * _MARGIN - _GAP + len(parts) * _CAPTION + (len(parts) - 1) * _MARGIN + sum(rows.values()) * row,
        max(2 * _MARGIN - _GAP + columns * column, 240),
    )
    canvas = np.full((*size, 3), 255, np.uint8)
    figure = Figure(figsize=(size[1] / 100, size[0] / 100), dpi=100)
    top = _MARGIN
    for caption, images in parts.items():
        figure.text(_MARGIN / size[1], 1 - top / size[0], caption, va="top", fontsize=9.5)
        top += _CAPTION
        bright = np.round(images * (255 / (levels - 1))).astype(np.uint8)
        for number, image in enumerate(bright.repeat(scale, axis=1).repeat(scale, axis=2)):
            y, x = top + number // columns * row, _MARGIN + number % columns * column
            canvas[y : y + height * scale, x : x + width * scale] = image
        top += rows[caption] * row + _MARGIN
    figure.figimage(canvas)
    figure.savefig(path, dpi=100)
