"""An audit's figures for programs: JSON in full, CSV by kind and place."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minference_green.findings import PLACES, Arm, Findings, findings
from minference_green.ledger import Audit, KindOfText, OfText
from minference_green.render.audit import audit_document


def audit_json(audit: Audit, directory: Path | None = None) -> str:
    """Header, doubts, conclusion and every figure of every arm; shares as fractions of 1."""
    found, document = findings(audit), audit_document(audit, directory)
    record = {
        "header": audit.header.model_dump(mode="json"),
        "complete": audit.complete,
        "answers_done": audit.answers_done,
        "answers_planned": audit.answers_planned,
        "joules": found.joules,
        "seconds": found.seconds,
        "conclusion": document.conclusion,
        "doubts": document.doubts,
        "text": [t.model_dump(mode="json") for t in audit.of(OfText)],
        "arms": [_arm(found, arm) for arm in found.arms],
    }
    return json.dumps(record, indent=1, default=str) + "\n"


def _arm(found: Findings, arm: Arm) -> dict[str, Any]:
    cost = asdict(arm.cost) | {
        "joules_per_mtok": arm.cost.joules_per_mtok,
        "seconds_per_mtok": arm.cost.seconds_per_mtok,
    }
    record: dict[str, Any] = {
        "context_length": arm.length,
        "method": arm.method,
        "computed": None if arm.computed is None else arm.computed.model_dump(mode="json"),
        "cost": cost,
        "places": {name: asdict(place) for name, place in arm.places.items()},
    }
    if arm.method == found.dense:
        return record
    figures = (
        "flips", "verdict", "kinds", "depths", "trend", "disparity", "detectable",
        "logprob_shift", "margin_shift", "preference_shift",
    )  # fmt: skip
    for name in figures:
        figure = getattr(arm, name)
        record[name] = None if figure is None else asdict(figure)
    record["treatments"] = [asdict(t) for t in arm.treatments]
    return record


def audit_csv(audit: Audit) -> str:
    """One row per length, arm, kind and place: answers dense gave right, and those kept.

    Of a text of the user's own one per length, arm and kind: what was kept and predicted of it.
    """
    out = io.StringIO()
    if audit.header.plan.text is None:
        columns: tuple[str, ...] = (
            "context_length", "method", "kind", "place", "dense_right", "kept"
        )  # fmt: skip
        rows = _rows(findings(audit))
    else:
        columns = ("context_length", "method", *KindOfText.model_fields)
        rows = [
            {"context_length": of.context_length, "method": of.method, **kind.model_dump()}
            for of in audit.of(OfText)
            for kind in of.kinds
        ]
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _rows(found: Findings) -> list[Mapping[str, str | int]]:
    return [
        {
            "context_length": arm.length,
            "method": arm.method,
            "kind": kind,
            "place": place,
            "dense_right": of,
            "kept": kept,
        }
        for arm in found.arms
        for kind in found.audit.header.plan.kinds
        for place in PLACES
        if place in arm.places
        for kept, of in [arm.kept(kind, place)]
    ]
