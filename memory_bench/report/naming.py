"""Names beside marks where there is room: never over a mark, a line or another name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 8.0  # of the letters, in points
REACH = 6.5  # half a mark, in points
OFFSETS = (
    (9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top"),
    (7, 7, "left", "bottom"), (7, -7, "left", "top"), (-7, 7, "right", "bottom"), (-7, -7, "right", "top"),
    (10, 14, "left", "bottom"), (10, -14, "left", "top"), (-10, 14, "right", "bottom"), (-10, -14, "right", "top"),
)  # fmt: skip
"""Points right of and above a mark, and how the name stands there; the first that is free is taken."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def touches(self, other: "Box") -> bool:
        """They overlap."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def inside(self, other: "Box") -> bool:
        """It lies within the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top

    def wider(self, by: float) -> "Box":
        """With a margin."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)


def name_marks(
    axes: "Axes",
    marks: Sequence[tuple[str, float, float]],
    lines: Sequence[tuple[float, float, float, float]],
    colors: Sequence[str],
) -> list[str]:
    """Write names beside marks; those for which there is no room are returned.

    Args:
        axes: with its limits set.
        marks: name and place of each in data coordinates; an empty name is only an obstacle.
        lines: from (x, y) to (x, y), upright or level, that no name may cross.
        colors: of the names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties

    canvas: Any = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    point = axes.figure.dpi / 72
    places = [axes.transData.transform((x, y)) for _, x, y in marks]
    taken = [Box(x, y, x, y).wider(REACH * point) for x, y in places]
    for x0, y0, x1, y1 in lines:
        (left, bottom), (right, top) = axes.transData.transform([(x0, y0), (x1, y1)])
        taken.append(Box(min(left, right), min(bottom, top), max(left, right), max(bottom, top)).wider(point))
    whole = axes.get_window_extent(renderer)
    frame = Box(whole.x0, whole.y0, whole.x1 + 40 * point, whole.y1)
    unnamed = []
    for (name, x, y), (left, bottom), color in zip(marks, places, colors, strict=True):
        if not name:
            continue
        width, height, _ = renderer.get_text_width_height_descent(name, FontProperties(size=SIZE), ismath=False)
        for right, up, across, along in OFFSETS:
            start = left + right * point - width * {"left": 0.0, "center": 0.5, "right": 1.0}[across]
            low = bottom + up * point - height * {"bottom": 0.0, "center": 0.5, "top": 1.0}[along]
            box = Box(start, low, start + width, low + height).wider(0.5 * point)
            if box.inside(frame) and not any(box.touches(other) for other in taken):
                taken.append(box)
                axes.annotate(name, (x, y), xytext=(right, up), textcoords="offset points", ha=across, va=along,
                              fontsize=SIZE, color=color, annotation_clip=False)  # fmt: skip
                break
        else:
            unnamed.append(name)
    return unnamed
