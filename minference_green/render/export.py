"""A report for programs: one record per context length and arm, in full precision."""

import csv
import io
import json
from dataclasses import asdict, fields
from pathlib import Path

from minference_green.render.conclusion import conclusion
from minference_green.render.rows import Row, doubts, rows
from minference_green.results import Run
from minference_green.stats import (
    Cell,
    Comparison,
    Estimate,
    break_even,
    breakdowns,
    decode_cells,
    method_names,
)

Value = str | int | float | bool | None

_COSTS = tuple(f.name for f in fields(Cell) if f.type is Estimate)
_SAVINGS = tuple(f.name for f in fields(Comparison) if f.type is Estimate)

_LOST = (
    "kl_nats",
    "kl_nats_past_whole_rows",
    "kl_nats_last_rows",
    "js_nats",
    "nll_change_nats",
    "recall",
    "recall_worst_head",
    "recall_in_situ",
    "output_error_worst_layer",
    "residual_cosine_lowest_layer",
    "faithfulness_reason",
)


def records(run: Run) -> list[dict[str, Value]]:
    """One flat record per cell; the unit is in each name, null is ``None`` with its reason.

    A figure ``x`` comes with ``x_low`` and ``x_high`` (90 %) and ``x_reason``.
    """
    return [_record(run, row) for row in rows(run)]


def _record(run: Run, row: Row) -> dict[str, Value]:
    header, print_, cell = run.header, run.header.fingerprint, row.cell
    record: dict[str, Value] = {
        "run_id": header.run_id,
        "created_at": header.created_at,
        "complete": run.complete,
        "quick": header.plan.quick,
        "devices": " + ".join(d.name for d in print_.devices),
        "model": print_.model,
        "model_revision": print_.model_revision,
        "weights": print_.weights,
        "dtype": print_.dtype,
        "batch": header.workload.batch,
        "context_length_tokens": cell.context_length,
        "method": cell.method,
        "reference": None if cell.is_reference else method_names(run)[0],
        "density": row.density.value,
        "density_reason": row.density.reason,
        "energy_obtained": cell.obtained,
    }
    for name in _COSTS:
        record |= _flat(name, getattr(cell, name))
    for name in _SAVINGS:
        compared = row.against_reference
        absent = Estimate(None, None, None, 0, "this is the reference")
        record |= _flat(name, getattr(compared, name) if compared else absent)
    factor = header.carbon.factor
    return record | {
        "logits_relative_error": row.logits_relative_error,
        "top1_agreement": row.top1_agreement,
        "sampled_positions": row.sampled_positions,
        **_lost(row),
        "blocks": cell.seconds_per_mtok.blocks,
        "windows_used": cell.windows_used,
        "windows_invalid": cell.windows_invalid,
        "grid_g_per_kwh": factor.g_per_kwh,
        "grid_location": factor.location,
        "grid_year": factor.year,
        "grid_assumed": factor.assumed,
        "pue": header.carbon.pue,
    }


def _lost(row: Row) -> dict[str, Value]:
    """Faithfulness in a few figures; every layer's are in the JSON report."""
    lost = row.faithfulness
    if lost is None:
        return {**dict.fromkeys(_LOST), "faithfulness_reason": row.faithfulness_reason}
    beyond, recall, in_situ = lost.beyond_whole_rows, lost.recall, lost.recall_in_situ
    figures = (
        lost.prompt.kl_nats,
        beyond.kl_nats if beyond else None,
        lost.last_rows.kl_nats,
        lost.prompt.js_nats,
        lost.prompt.nll_change_nats,
        recall.mean if recall else None,
        recall.worst_head if recall else None,
        in_situ.mean if in_situ else None,
        max(lost.output_error),
        min(lost.residual_cosine),
        lost.recall_reason,
    )
    return dict(zip(_LOST, figures, strict=True))


def _flat(name: str, estimate: Estimate) -> dict[str, Value]:
    return {
        name: estimate.value,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_reason": estimate.reason,
    }


def as_csv(*runs: Run) -> str:
    """The records as CSV (RFC 4180 quoting, line feed at line ends); null is an empty field."""
    out = io.StringIO()
    table = [record for run in runs for record in records(run)]
    writer = csv.DictWriter(out, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def as_json(run: Run, directory: Path | None = None) -> str:
    """The records with header, doubts, break-even lengths and conclusion, as one JSON object."""
    crossings = [vars(break_even(run, name)) for name in method_names(run)[1:]]
    report = {
        "header": run.header.model_dump(mode="json"),
        "complete": run.complete,
        "cut": run.cut,
        "doubts": doubts(run, directory),
        "cells": records(run),
        "faithfulness": [
            {
                "context_length_tokens": row.cell.context_length,
                "method": row.cell.method,
                **row.faithfulness.model_dump(mode="json"),
            }
            for row in rows(run)
            if row.faithfulness
        ],
        "decode": [asdict(cell) for cell in decode_cells(run)],
        "breakdown": [{**asdict(b), "closure": b.closure} for b in breakdowns(run)],
        "break_even": crossings,
        "conclusion": conclusion(run),
    }
    return json.dumps(report, indent=2, allow_nan=False) + "\n"
