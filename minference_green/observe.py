"""What an arm computes and what its attention and output lose; outside energy windows.

Two prefills an arm. In the reference arm's, every other arm also attends to the reference's
queries and keys, so that its choice of pairs is judged without the errors of earlier layers. In
its own, its density, times and kept attention are noted, and its output is compared. Only
sampled rows of anything are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean

import torch
from torch import Tensor

from minference_green.cell import Cell
from minference_green.channel import Channel
from minference_green.faithfulness import (
    Divergences,
    RecallError,
    causal_lse,
    divergences,
    kept_mass,
    made_by_head,
    relative_rms,
    sampled_rows,
)
from minference_green.methods.dense import Dense
from minference_green.methods.method import LayerProfile, PrefillMethod, ProfiledMethod
from minference_green.model.hidden import head, tapped
from minference_green.results import Divergence, Faithfulness, Note, Observation, Recall
from minference_green.task import Task
from minference_green.torch_device import free_memory
from minference_green.workload import format_length

POSITIONS = 2048
"""Prompt positions whose next-token distributions are compared: 16 in each 1/128."""

LAST_POSITIONS = 64
"""Further positions at the end: what MInference's estimator looks at and serves best."""

ROWS = 256
"""Rows per layer and head whose kept attention, output and residual stream are compared."""

DENSITY_WARNING = 0.8
"""Above this a sparse method computes nearly everything and is a dense one with overhead."""

NO_RECALL = "the method's profile tells no log-sum-exp, so what it kept is not known"


@dataclass(frozen=True)
class _Sample:
    """Which positions of a prompt are looked at."""

    length: int
    positions: Tensor
    """Ascending, those of the whole prompt and the last ones together."""
    spread: Tensor
    """Which of them are spread over the prompt, bool."""
    rows: Tensor

    @classmethod
    def of(cls, length: int) -> "_Sample":
        spread = sampled_rows(length, POSITIONS)
        last = torch.arange(max(0, length - LAST_POSITIONS), length)
        positions = torch.cat([spread, last]).unique()
        return cls(length, positions, torch.isin(positions, spread), sampled_rows(length, ROWS))

    @property
    def last(self) -> Tensor:
        """Which positions are the last ones, bool."""
        return self.positions >= self.length - LAST_POSITIONS


@dataclass
class _Kept:
    """Attention kept at the sampled rows, layer by layer."""

    by_layer: dict[int, Tensor] = field(default_factory=dict)
    """``[B, Hq, R]`` on the CPU."""
    defect: str | None = None

    def note(
        self, profile: LayerProfile, dense_lse: Callable[[], Tensor], rows: Tensor, layer: int
    ) -> None:
        """``dense_lse`` gives ``[B, Hq, R]``, of the sampled rows; asked for if it is needed."""
        if profile.lse is None:
            if bool((profile.density == 1).all()):  # every causal pair, as dense layers have
                batch, n_heads = profile.out.shape[:2]
                self.by_layer[layer] = torch.ones(batch, n_heads, len(rows))
            return
        try:
            at = rows.to(profile.lse.device)
            kept = kept_mass(profile.lse.index_select(2, at), dense_lse())
        except RecallError as error:
            self.defect = self.defect or f"layer {layer}: {error}"
            return
        self.by_layer[layer] = kept.cpu()


class _Own:
    """An arm in its own prefill: what it computes, how long its steps take, what it keeps."""

    def __init__(self, method: PrefillMethod, sample: _Sample) -> None:
        self._method, self._sample = method, sample
        self.name, self.parameters = method.name, method.parameters
        self.profiled = isinstance(method, ProfiledMethod)
        self.density: dict[int, tuple[float, ...]] = {}
        self.steps = [0.0, 0.0, 0.0]
        self.kept = _Kept()
        self.layers: list[int] = []
        self.whole_rows: dict[int, int] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        self.layers.append(layer)
        if not isinstance(self._method, ProfiledMethod):
            return self._method.attend(q, k, v, scale=scale, layer=layer)
        profile = self._method.profile(q, k, v, scale=scale, layer=layer)
        self.density[layer] = tuple(profile.density.tolist())
        seconds = (profile.estimate_seconds, profile.index_seconds, profile.attend_seconds)
        self.steps = [total + step for total, step in zip(self.steps, seconds, strict=True)]
        rows = self._sample.rows
        self.kept.note(profile, lambda: _dense_lse(q, k, rows, scale), rows, layer)
        if profile.indices:
            whole = (int(index.whole_rows(q.shape[2]).min()) for index in profile.indices)
            self.whole_rows[layer] = min(whole)
        elif bool((profile.density == 1).all()):
            self.whole_rows[layer] = q.shape[2]
        return profile.out


def _dense_lse(q: Tensor, k: Tensor, rows: Tensor, scale: float) -> Tensor:
    return causal_lse(q.index_select(2, rows.to(q.device)), k, rows, scale=scale)


@dataclass
class _Taught:
    """What an arm does with the reference arm's queries, keys and values."""

    method: PrefillMethod
    kept: _Kept = field(default_factory=_Kept)
    output_error: dict[int, float] = field(default_factory=dict)
    failure: str | None = None


class _Teacher:
    """The reference arm in its own prefill, while the others attend to the same."""

    def __init__(self, own: _Own, taught: dict[str, _Taught], sample: _Sample) -> None:
        self._own, self._taught, self._sample = own, taught, sample
        self.name, self.parameters = own.name, own.parameters

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        out = self._own.attend(q, k, v, scale=scale, layer=layer)
        rows = self._sample.rows
        at = rows.to(q.device)
        wanted = out.index_select(2, at)
        dense_lse = cache(lambda: _dense_lse(q, k, rows, scale))
        for taught in self._taught.values():
            if taught.failure is not None:
                continue
            try:
                if isinstance(taught.method, ProfiledMethod):
                    profile = taught.method.profile(q, k, v, scale=scale, layer=layer)
                    taught.kept.note(profile, dense_lse, rows, layer)
                    found = profile.out
                else:
                    found = taught.method.attend(q, k, v, scale=scale, layer=layer)
            except torch.OutOfMemoryError as error:
                taught.failure = f"out of memory beside the reference arm: {_first_line(error)}"
                continue
            off = relative_rms(found.index_select(2, at), wanted, (0, 1, 2, 3))
            taught.output_error[layer] = float(off)
        return out


@dataclass(frozen=True)
class _Prefill:
    """What is kept of one prefill."""

    logits: Tensor
    """Of the last position, ``[B, vocabulary]`` fp32."""
    last: Tensor
    """What the head is given at the sampled positions, ``[B, m, width]``."""
    residual: dict[int, Tensor]
    """What each layer hands on at the sampled rows, ``[B, R, width]``."""


def observe(
    channel: Channel, task: Task, length: int, arms: dict[str, Cell], reference: str
) -> None:
    """Density, step times, and what attention and output lose against ``reference``; unmetered.

    One record per arm that has none on file. An arm that does not fit into memory is noted.
    """
    missing = [name for name in arms if (length, name) not in task.observed]
    if not missing:
        return
    sample = _Sample.of(length)
    taught = {name: _Taught(arms[name].method) for name in missing if name != reference}
    standard: _Prefill | None = None
    for name in dict.fromkeys([reference, *missing]):
        if name not in arms:
            continue
        channel.ask("cell", step="observing", context_length=length, method=name)
        cell = arms[name]
        own = _Own(cell.method, sample)
        teacher = _Teacher(own, taught, sample) if name == reference else None
        try:
            if teacher and own.profiled and not isinstance(cell.method, Dense):
                # The first profile compiles what no window runs; the others' is in the teacher.
                _prefill(cell, _Own(cell.method, sample), sample)
            seen = _prefill(cell, teacher or own, sample)
            record = _observation(task.block, length, own)
            if teacher:
                standard = seen
            elif standard is None:
                reason = f"the reference arm {reference} was not observed"
                record = record.model_copy(update={"faithfulness_reason": reason})
            else:
                record = _compared(record, cell, sample, own, taught[name], standard, seen)
        except torch.OutOfMemoryError as error:
            text = f"{name} at {format_length(length)} not observed: {_first_line(error)}"
            channel.ask("record", record=Note(message=text).model_dump(mode="json"))
            continue
        finally:
            free_memory(cell.ids.device)
        if name in missing:
            channel.ask("record", record=record.model_dump(mode="json"))


def _prefill(cell: Cell, method: PrefillMethod, sample: _Sample) -> _Prefill:
    """One prefill of the cell's prompt with ``method`` in place of its own."""
    kept: list[Tensor] = []
    residual: dict[int, Tensor] = {}

    def layer(number: int, hidden: Tensor) -> None:
        residual[number] = hidden.index_select(1, sample.rows.to(hidden.device))

    def last(hidden: Tensor) -> None:
        kept.append(hidden.index_select(1, sample.positions.to(hidden.device)))

    with tapped(cell.model.model, layer=layer, last=last):
        logits = Cell(cell.model, method, cell.dense, cell.ids).prefill()
    return _Prefill(logits[:, -1].float(), kept[-1], residual)


@torch.inference_mode()
def _compared(
    record: Observation,
    cell: Cell,
    sample: _Sample,
    own: _Own,
    taught: _Taught,
    standard: _Prefill,
    seen: _Prefill,
) -> Observation:
    """The record with what the arm lost against the standard."""
    error = float((seen.logits - standard.logits).norm() / standard.logits.norm())
    record = record.model_copy(update={"logits_relative_error": error})
    made = head(cell.model.model)
    if reason := taught.failure or _incomparable(made, standard, seen):
        return record.model_copy(update={"faithfulness_reason": reason})
    assert made is not None
    found = divergences(
        standard.last.flatten(0, 1),
        seen.last.flatten(0, 1),
        made[0],
        _following(cell.ids, sample.positions).flatten(),
        bias=made[1],
    )
    lost = _faithfulness(sample, found, own, taught, standard, seen)
    defects = tuple(
        f"{own.name} at {format_length(sample.length)}, {defect}"
        for defect in (taught.kept.defect, own.kept.defect)
        if defect
    )
    return record.model_copy(
        update={
            "top1_agreement": lost.prompt.top1_agreement,
            "sampled_positions": lost.prompt.positions,
            "faithfulness": lost,
            "notes": (*record.notes, *defects),
        }
    )


def _incomparable(
    made: tuple[Tensor, Tensor | None] | None, standard: _Prefill, seen: _Prefill
) -> str | None:
    """Why the two arms' distributions cannot be compared, if so."""
    if made is None:
        return "the model has no plain linear head, so its distributions cannot be made again"
    for whose, states in (("reference arm's ", standard.last), ("", seen.last)):
        broken = int((~states.isfinite()).any(-1).sum())
        if broken:
            at = f"{broken} of {states[..., 0].numel()} positions"
            return f"the {whose}output is not finite at {at}"
    if not made_by_head(standard.last[:, -1], standard.logits, *made):
        return "the model changes its logits after its head (a scale, a soft cap)"
    return None


def _following(ids: Tensor, positions: Tensor) -> Tensor:
    """The prompt's token after each position, ``[B, m]``; -1 after the last."""
    after = torch.nn.functional.pad(ids, (0, 1), value=-1)
    return after.index_select(1, positions.to(ids.device) + 1)


def _faithfulness(
    sample: _Sample,
    found: Divergences,
    own: _Own,
    taught: _Taught,
    standard: _Prefill,
    seen: _Prefill,
) -> Faithfulness:
    layers = own.layers
    batch = len(standard.last)
    positions, spread, last = (
        x.repeat(batch) for x in (sample.positions, sample.spread, sample.last)
    )
    whole = min(own.whole_rows.values()) if own.whole_rows.keys() == set(layers) else None
    beyond = spread & (positions >= whole) if whole is not None else torch.zeros_like(spread)
    deciles = positions * 10 // sample.length
    kl = found.kl.cpu()
    recalls = (_recall(kept, layers, sample) for kept in (taught.kept, own.kept))
    recall, recall_in_situ = recalls
    return Faithfulness(
        prompt=_divergence(found, spread),
        last_rows=_divergence(found, last),
        beyond_whole_rows=_divergence(found, beyond) if bool(beyond.any()) else None,
        whole_rows=whole,
        kl_nats_by_decile=tuple(_mean(kl[spread & (deciles == d)]) for d in range(10)),
        layers=tuple(layers),
        rows=len(sample.rows) * batch,
        recall=recall,
        recall_in_situ=recall_in_situ,
        recall_reason=taught.kept.defect or own.kept.defect or (None if recall else NO_RECALL),
        output_error=tuple(_short(taught.output_error[n]) for n in layers),
        residual_cosine=tuple(_short(_cosine(standard, seen, n)) for n in layers),
    )


def _divergence(found: Divergences, where: Tensor) -> Divergence:
    change = found.nll_change.cpu()[where]
    return Divergence(
        positions=int(where.sum()),
        kl_nats=_short(found.kl.cpu()[where].mean()),
        js_nats=_short(found.js.cpu()[where].mean()),
        top1_agreement=float(found.same_top.cpu()[where].double().mean()),
        nll_change_nats=_mean(change[~change.isnan()]),
    )


def _recall(kept: _Kept, layers: Sequence[int], sample: _Sample) -> Recall | None:
    """The means of what was kept; none unless every layer told it."""
    if kept.defect or kept.by_layer.keys() != set(layers):
        return None
    deciles = sample.rows * 10 // sample.length
    return Recall(
        by_head=tuple(
            tuple(_short(mass) for mass in kept.by_layer[n].mean((0, 2))) for n in layers
        ),
        by_decile=tuple(
            tuple(_mean(kept.by_layer[n][:, :, deciles == d]) for d in range(10)) for n in layers
        ),
    )


def _cosine(standard: _Prefill, seen: _Prefill, layer: int) -> Tensor:
    one, other = (x.residual[layer].float() for x in (standard, seen))
    return torch.cosine_similarity(one, other, dim=-1).mean()


def _mean(x: Tensor) -> float | None:
    return _short(x.mean()) if x.numel() else None


def _short(value: Tensor | float) -> float:
    """Six digits: more say nothing, and a file holds thousands."""
    return float(f"{float(value):.6g}")


def _observation(block: int, length: int, own: _Own) -> Observation:
    if not own.profiled:
        return Observation(
            block=block,
            context_length=length,
            method=own.name,
            density=None,
            density_reason="the method has no profile(), so it does not tell what it computes",
        )
    density = fmean(d for layer in own.density.values() for d in layer)
    notes: tuple[str, ...] = ()
    if density > DENSITY_WARNING and own.name not in ("dense", "dense-again", "auto"):
        notes = (
            f"density {density:.2f} at {format_length(length)}: these budgets leave almost "
            "nothing out; use smaller budgets or a pattern file made for this model",
        )
    return Observation(
        block=block,
        context_length=length,
        method=own.name,
        density=density,
        density_by_layer=tuple(own.density[layer] for layer in sorted(own.density)),
        estimate_seconds=own.steps[0],
        index_seconds=own.steps[1],
        attend_seconds=own.steps[2],
        notes=notes,
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
