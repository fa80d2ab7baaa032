"""The rows of `mesh.py` as Markdown."""

from typing import Any

_CASE = ("case", "pass", "devices", "T", "H", "N")
_CHECKS = (("held GiB", 1, 2), ("peak GiB", 1, 2), "error", "error of sums")
# Names in the rows: as they are, or with a factor and the digits to show; and in the head.
_TIMES = (("planned", 1e3, 2), ("seconds", 1e3, 2), ("silent", 1e3, 2), ("ratio", 1, 3))
_TIMES += (("alone", 1e3, 2), ("share", 1, 3), ("TFLOP/s per device", 1, 1))
_WIRE = (("planned bytes", 1e-6, 1), ("bytes", 1e-6, 1))
_WIRE += (("messages ms", 1, 2), ("exposed ms", 1, 2), ("idle ms", 1, 2))
_TITLES = {
    "planned": "planned ms",
    "seconds": "ms",
    "silent": "without messages",
    "alone": "one device",
    "share": "share of it",
    "planned bytes": "planned MB",
    "bytes": "MB",
}
MESH = (*_CASE, "copies", *_TIMES, *_WIRE, *_CHECKS, "local", "methods")
BILLION = (*_CASE, _TIMES[0], _TIMES[1], _TIMES[-1], *_CHECKS, "methods")


def table(rows: list[dict], columns: tuple) -> str:
    """The rows as Markdown; "-" where a row has no such number."""
    names = [one if isinstance(one, str) else one[0] for one in columns]
    titles = [_TITLES.get(name, name) for name in names]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for row in rows:
        made = {"share": share(row), "copies": "engines" if row.get("copy engines") else "kernels"}
        cells = [_shown(row | made, one) for one in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def share(row: dict) -> float | None:
    """Seconds of one device over the devices' seconds together."""
    if not row.get("alone"):
        return None
    return row["alone"] / (row["devices"] * row["seconds"])


def _shown(row: dict, column: Any) -> str:
    name, factor, digits = (column, 1, None) if isinstance(column, str) else column
    value = row.get(name)
    if value is None:
        return "-"
    if digits is None:
        return f"{value:.1e}" if isinstance(value, float) else str(value)
    return f"{value * factor:.{digits}f}"
