"""Several runs over time, each against the one before it on the same ground."""

from collections.abc import Sequence

from minference_green.render.document import Document, Sheet
from minference_green.render.numbers import ABSENT, figure, percent, significant
from minference_green.render.rows import rows
from minference_green.results import Run
from minference_green.workload import format_length


def document(runs: Sequence[Run]) -> Document:
    """A row per run and cell, in order of time."""
    before: dict[tuple[str, ...], float] = {}
    table = []
    for run in runs:
        print_ = run.header.fingerprint
        devices = " + ".join(d.name for d in print_.devices)
        for row in rows(run):
            joules = row.cell.joules_per_mtok
            ground = (devices, print_.model, print_.dtype, print_.workload_hash)
            key = (*ground, str(row.cell.context_length), row.cell.method, row.cell.obtained)
            last = before.get(key)
            moved = ABSENT
            if joules.value is not None:
                moved = f"{100 * (joules.value / last - 1):+.1f} %" if last else "first"
                before[key] = joules.value
            saved = row.against_reference
            table.append(
                (
                    run.header.created_at[:16],
                    format_length(row.cell.context_length),
                    row.cell.method,
                    significant(row.density.value, 2),
                    figure(joules),
                    moved,
                    percent(saved.energy_saving) if saved else "",
                    row.cell.obtained,
                    devices,
                    run.header.run_id,
                )
            )
    sheet = Sheet(
        "Prefill over time; change is in J/Mtok against the run before on the same ground",
        (
            "When",
            "Context",
            "Method",
            "Density",
            "J/Mtok",
            "Change",
            "Energy saved",
            "Joules by",
            "Device",
            "Run",
        ),
        tuple(table),
    )
    span = f"{runs[0].header.created_at} to {runs[-1].header.created_at}"
    return Document((("Runs", f"{len(runs)}, {span}"),), (), (sheet,), (), ())
