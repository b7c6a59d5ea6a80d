"""A plan of ``pymla quantize`` as values that JSON can hold, and as tables."""

from typing import Any

from pymla import ggml
from pymla.cli.page import Page
from pymla.host.memory import size_text
from pymla.make.quantize_plan import Plan, Row
from pymla.printable import one_line


def report(plan: Plan) -> dict[str, Any]:
    """All of a plan. ``refusals`` say why it cannot be carried out; ``target`` is None where no size was given."""
    found = plan.found
    return {
        "path": str(plan.file.path),
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "from": ggml.NAME[row.source],
                "to": ggml.NAME[row.qtype],
                "reason": row.reason,
                "source_bytes": row.source_bytes,
                "bytes": row.nbytes,
            }
            for row in plan.rows
        ],
        "types": _types(plan),
        "weights": plan.weights,
        "source_bytes": plan.source_bytes,
        "bytes": plan.nbytes,
        "file_bytes": plan.file_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "target": None if found is None else {"error": found.cost, "least_error": found.least_cost},
        "refusals": list(plan.refusals),
        "notes": list(plan.notes),
    }


def show(plan: Plan) -> None:
    """Print a plan, tensor by tensor."""
    page = Page()
    for refusal in plan.refusals[:1]:
        page.warn(f"Not possible: {one_line(refusal)}")
    page.lines("Tensors", [_cells(row) for row in plan.rows])
    types = [(each["type"], each["tensors"], f"{each['weights']:,}", size_text(each["bytes"])) for each in _types(plan)]
    if types:
        page.table("Types", "type", "tensors", "weights", "size", rows=types, numbers=(1, 2, 3))
    page.table("File", rows=_totals(plan), numbers=(1,))


def _cells(row: Row) -> tuple[str, ...]:
    """Name, shape, types, size and reason."""
    shape = " × ".join(map(str, row.shape))
    types = f"{ggml.NAME[row.source]} → {ggml.NAME[row.qtype]}"
    return one_line(row.name, 60), shape, types, size_text(row.nbytes), row.reason


def summary(plan: Plan) -> str:
    """Size and bits of a plan in a line."""
    before = size_text(plan.source_bytes)
    return f"{size_text(plan.file_bytes)}, {plan.bits_per_weight:.2f} bits per weight, from {before}"


def _totals(plan: Plan) -> list[tuple[str, str]]:
    rows = [
        ("tensors before", size_text(plan.source_bytes)),
        ("tensors", size_text(plan.nbytes)),
        ("file", f"{plan.file_bytes:,} bytes"),
        ("bits per weight", f"{plan.bits_per_weight:.3f}"),
    ]
    if plan.found is not None:
        rows += [
            ("sum of relative errors", f"{plan.found.cost:.5g}"),
            ("no choice of this size has less than", f"{plan.found.least_cost:.5g}"),
        ]
    return rows


def _types(plan: Plan) -> list[dict[str, Any]]:
    """Counts by type, most bytes first."""
    types: dict[int, dict[str, Any]] = {}
    for row in plan.rows:
        entry = types.setdefault(row.qtype, {"type": ggml.NAME[row.qtype], "tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += row.weights
        entry["bytes"] += row.nbytes
    return sorted(types.values(), key=lambda entry: -entry["bytes"])
