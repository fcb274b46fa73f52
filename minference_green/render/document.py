"""A report as headings, rows of text and footnotes; terminal and Markdown print the same."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minference_green.render.conclusion import conclusion
from minference_green.render.numbers import (
    ABSENT,
    closure,
    factor,
    figure,
    fraction,
    percent,
    significant,
)
from minference_green.render.rows import Row, doubts, facts, rows
from minference_green.results import Run
from minference_green.stats import Estimate, breakdowns, decode_cells, method_names
from minference_green.workload import format_length


@dataclass(frozen=True)
class Sheet:
    """One table: a caption, columns with their units, rows of ready text."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Document:
    """Everything a report says, in order."""

    facts: tuple[tuple[str, str], ...]
    doubts: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    footnotes: tuple[str, ...]
    conclusion: tuple[str, ...]


def document(run: Run, directory: Path | None = None) -> Document:
    """The report of a run; ``directory`` is where its file lies, for the resume line."""
    notes = _Footnotes()
    found = rows(run)
    sheets = [_cost(run, found, notes)]
    if len(method_names(run)) > 1:
        sheets += [_savings(run, found, notes), _losses(run, found, notes)]
        sheets += _faithfulness(run, found, notes)
    sheets += _decode(run, notes)
    sheets += _breakdown(run)
    sheets.append(_evidence(found))
    return Document(facts(run), doubts(run, directory), tuple(sheets), notes.texts, conclusion(run))


class _Footnotes:
    """Reasons, numbered as they are first met."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._texts)

    def mark(self, text: str, *reasons: str | None) -> str:
        for reason in reasons:
            if reason is not None:
                if reason not in self._texts:
                    self._texts.append(reason)
                text += f" ({self._texts.index(reason) + 1})"
        return text


def _key(row: Row) -> tuple[str, str]:
    return format_length(row.cell.context_length), row.cell.method


def _density(row: Row, notes: _Footnotes) -> str:
    return notes.mark(significant(row.density.value, 2), row.density.reason)


def _cost(run: Run, found: tuple[Row, ...], notes: _Footnotes) -> Sheet:
    grid = run.header.carbon.factor
    assumed = f"assumed: {grid.location}, for no location was given" if grid.assumed else None

    def told(estimate: Estimate, doubt: str | None = None) -> str:
        return notes.mark(figure(estimate), estimate.reason, doubt)

    return Sheet(
        "Cost of prefill per million tokens (Mtok); SCI is operational plus embodied",
        ("Context", "Method", "Density", "J/Mtok", "gCO2e/Mtok", "SCI g/Mtok", "s/Mtok", "TTFT s"),
        tuple(
            (
                *_key(row),
                _density(row, notes),
                told(row.cell.joules_per_mtok),
                told(row.cell.operational_g_per_mtok, assumed),
                told(row.cell.sci_g_per_mtok, assumed),
                told(row.cell.seconds_per_mtok),
                told(row.cell.ttft_seconds),
            )
            for row in found
        ),
    )


def _decode(run: Run, notes: _Footnotes) -> list[Sheet]:
    """Generated tokens, never mixed with prefill: another quantity with another denominator."""
    found = decode_cells(run)
    if not found:
        return []

    def told(estimate: Estimate, form: Callable[[Estimate], str] = figure) -> str:
        return notes.mark(form(estimate), estimate.reason)

    return [
        Sheet(
            "Cost of decode per million generated tokens, dense over the cache that each prefill "
            "left; a request is prefill and decode as one, beside the sum of its parts",
            (
                "Context",
                "Method",
                "Generated",
                "J/Mtok",
                "gCO2e/Mtok",
                "s/Mtok",
                "J/request",
                "Sum - whole, J",
                "Sum - whole, s",
            ),
            tuple(
                (
                    format_length(cell.context_length),
                    cell.method,
                    str(cell.tokens),
                    told(cell.joules_per_mtok),
                    told(cell.operational_g_per_mtok),
                    told(cell.seconds_per_mtok),
                    told(cell.joules_per_request),
                    told(cell.energy_closure, closure),
                    told(cell.time_closure, closure),
                )
                for cell in found
            ),
        )
    ]


def _breakdown(run: Run) -> list[Sheet]:
    found = breakdowns(run)
    if not found:
        return []
    known = {p for b in found for p in b.part_joules}
    parts = tuple(p for p in ("estimate", "index", "attention", "rest") if p in known)
    replayed = found[0]
    layers = ", ".join(map(str, replayed.layers))
    return [
        Sheet(
            "Where the joules of one prefill go: each part repeated alone, in the first block, "
            f"with the inputs of layers {layers}, scaled to {replayed.layers_in_all}; rest is a "
            "prefill without attention; idle is the share drawn with nothing running",
            (
                "Context",
                "Method",
                *(f"{p.capitalize()} J" for p in parts),
                "Whole J",
                "Sum - whole",
                "Of it idle",
            ),
            tuple(
                (
                    format_length(b.context_length),
                    b.method,
                    *(significant(b.part_joules.get(p), 3) for p in parts),
                    significant(b.whole_joules, 3),
                    f"{100 * b.closure:+.1f} %",
                    ABSENT if b.idle_share is None else f"{100 * b.idle_share:.0f} %",
                )
                for b in found
            ),
        )
    ]


def _savings(run: Run, found: tuple[Row, ...], notes: _Footnotes) -> Sheet:
    compared = [(row, row.against_reference) for row in found if row.against_reference]
    return Sheet(
        f"Against {method_names(run)[0]}, with 90 % intervals over blocks; below zero costs more",
        ("Context", "Method", "Density", "Energy saved", "Time saved", "Speed-up"),
        tuple(
            (
                *_key(row),
                _density(row, notes),
                notes.mark(percent(c.energy_saving), c.energy_saving.reason),
                notes.mark(percent(c.time_saving), c.time_saving.reason),
                notes.mark(factor(c.speedup), c.speedup.reason),
            )
            for row, c in compared
        ),
    )


def _losses(run: Run, found: tuple[Row, ...], notes: _Footnotes) -> Sheet:
    def share(value: float | None) -> str:
        if value is None:
            return notes.mark(ABSENT, "the outputs of both arms were not compared in this run")
        return f"{100 * value:.1f} %"

    return Sheet(
        f"Output against {method_names(run)[0]}: error of the last position's logits, "
        "and the share of sampled positions with the same most likely token",
        ("Context", "Method", "Logits error", "Top-1 same", "Positions"),
        tuple(
            (
                *_key(row),
                share(row.logits_relative_error),
                share(row.top1_agreement),
                str(row.sampled_positions) if row.top1_agreement is not None else ABSENT,
            )
            for row in found
            if row.against_reference
        ),
    )


def _faithfulness(run: Run, found: tuple[Row, ...], notes: _Footnotes) -> list[Sheet]:
    """Nothing for a run from before it was observed."""
    shown = [r for r in found if r.faithfulness or r.faithfulness_reason]
    if not shown:
        return []
    return [
        Sheet(
            f"Faithfulness to {method_names(run)[0]}: how far next-token distributions are "
            "(KL, in nats) over the prompt, past the rows that see all keys, and in its last 64 "
            "positions; attention mass kept (recall) on the reference's queries and keys, and on "
            "the arm's own (in situ); error of the worst layer's attention output; lowest cosine "
            "between residual streams",
            (
                "Context",
                "Method",
                "KL",
                "KL past",
                "KL last 64",
                "NLL change",
                "Recall",
                "Worst head",
                "In situ",
                "Output error",
                "Cosine",
            ),
            tuple((*_key(row), *_faithful(row, notes)) for row in shown),
        )
    ]


def _faithful(row: Row, notes: _Footnotes) -> tuple[str, ...]:
    lost = row.faithfulness
    if lost is None:
        return (notes.mark(ABSENT, row.faithfulness_reason), *[ABSENT] * 8)
    beyond, recall, in_situ = lost.beyond_whole_rows, lost.recall, lost.recall_in_situ
    return (
        significant(lost.prompt.kl_nats, 2),
        significant(beyond.kl_nats if beyond else None, 2),
        significant(lost.last_rows.kl_nats, 2),
        significant(lost.prompt.nll_change_nats, 2),
        notes.mark(fraction(recall.mean if recall else None), lost.recall_reason),
        fraction(recall.worst_head if recall else None),
        fraction(in_situ.mean if in_situ else None),
        f"{100 * max(lost.output_error):.1f} %",
        fraction(min(lost.residual_cosine)),
    )


def _evidence(found: tuple[Row, ...]) -> Sheet:
    return Sheet(
        "Evidence",
        ("Context", "Method", "Joules by", "Blocks", "Windows used", "Invalid"),
        tuple(
            (
                *_key(row),
                row.cell.obtained,
                str(row.cell.seconds_per_mtok.blocks),
                str(row.cell.windows_used),
                str(row.cell.windows_invalid),
            )
            for row in found
        ),
    )
