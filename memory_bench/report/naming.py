"""Names beside marks where there is room, and beside the ends of curves: never over a mark, a line or another name."""

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


def name_ends(axes: "Axes", ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names right of the axes, each as near the end of its curve as the others let it; a line leads there.

    Args:
        axes: with all that is drawn; its limits stay what they are.
        ends: name, place of the curve's end in data coordinates, and colour.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    canvas: Any = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    frame = axes.get_window_extent(canvas.get_renderer())  # type: ignore[no-untyped-call]
    wanted = [float(axes.transData.transform((x, y))[1]) for _, x, y, _ in ends]
    heights = spread_out(wanted, 1.3 * SIZE * axes.figure.dpi / 72)
    for (name, x, y, color), height in zip(ends, heights, strict=True):
        place = (height - frame.y0) / frame.height
        axes.annotate(name, (x, y), xytext=(1.05, place), textcoords="axes fraction", ha="left", va="center",
                      fontsize=SIZE, color=color, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.7, "shrinkA": 1,
                                  "shrinkB": 4})  # fmt: skip


def spread_out(wanted: Sequence[float], least: float) -> list[float]:
    """Places at least so far apart, in the order of those wanted and together as near them as can be."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # of neighbours that touch: sum of what they want, less their steps; how many
    for step, i in enumerate(order):
        groups.append([wanted[i] - step * least, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    places = [total / count for total, count in groups for _ in range(int(count))]
    found = dict(zip(order, (place + step * least for step, place in enumerate(places)), strict=True))
    return [found[i] for i in range(len(wanted))]
