"""The process that holds the audited model: it asks, the parent meters and writes."""

import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from minference_green.auditing.arms import EqualDensity, arms
from minference_green.auditing.ask import FILLED, ModelRespondent, Prompt, Respondent, show
from minference_green.auditing.audit import Conversation, InProcess
from minference_green.auditing.loop import Parent, Progress, ask_everything, out_of_memory, skip
from minference_green.auditing.own_text import check_readable, of_text, own_text
from minference_green.auditing.plan import read_text
from minference_green.channel import Message
from minference_green.corpus.filler import FILLERS, OwnText
from minference_green.corpus.recipe import Recipe
from minference_green.errors import UsageError
from minference_green.faithfulness import RecallError, causal_lse, kept_mass, sampled_rows
from minference_green.ledger import AuditPlan, Computed
from minference_green.methods.auto import Auto, Choice, Deciding
from minference_green.methods.backend import synchronize
from minference_green.methods.dense import Dense, free_bytes
from minference_green.methods.method import PrefillMethod, ProfiledMethod
from minference_green.methods.yardstick import KeyOracle, check_tokens
from minference_green.model.loading import LoadedModel, load
from minference_green.model.text import Encoder, encoder
from minference_green.results import Backends
from minference_green.torch_device import describe_device, free_memory, resolve_device
from minference_green.worker import TimesBackends, identity, work

RECALL_ROWS = 256
"""Rows per layer and head whose kept attention is looked at."""

CACHE_SHARE = 0.25
"""Of the free memory, what the caches of a group may take."""


def main(read_fd: int, write_fd: int) -> int:
    """Ask what the parent's plan says; the exit code is 0 unless the parent went away."""
    return work(read_fd, write_fd, serve)


def serve(
    parent: Parent,
    task: Message,
    device: torch.device,
    model: LoadedModel | None = None,
    own: Mapping[str, PrefillMethod] = MappingProxyType({}),
) -> None:
    """Put every question of the plan to every arm.

    ``model`` is loaded already or to be loaded by its name; ``own`` are methods given as
    objects, by name.
    """
    began = time.monotonic()
    plan = AuditPlan.model_validate(task["plan"])
    model = model or load(
        task["model"],
        device=device,
        dtype=getattr(torch, plan.dtype),
        seed=plan.seed,
        allow_longer=task["allow_longer"],
    )
    methods = arms(
        task["methods"], task["options"], model, budgets=plan.budgets, seed=plan.seed, own=own
    )
    for name, method in methods.items():
        if isinstance(method, KeyOracle | EqualDensity):
            check_tokens(name, max(plan.context_lengths))
    reader = encoder(model)
    if plan.text is not None:
        _serve_text(parent, task, plan, model, methods, reader)
        return
    respondent = ModelRespondent(
        model=model,
        encoder=reader,
        seed=plan.seed,
        filler=own_filler(plan),
        recipe=Recipe(
            inside=plan.inside,
            after=plan.after,
            end=plan.end,
            kinds=plan.kinds,
            competitors=plan.competitors,
            token_bytes=reader.bytes_per_token or 4,
        ),
    )
    # What cannot be asked ends the audit before it has a file.
    fullest = respondent.fullest(plan.haystacks)
    for length in plan.context_lengths:
        respondent.prompt(fullest, length)
    parent.ask("loaded", **identity(model, methods))
    parent.ask("spent", what="setup", start=began, end=time.monotonic())
    done = Progress(
        frozenset((n, i) for n, i in task["asked"]),
        frozenset((n, i, m) for n, i, m in task["answered"]),
    )
    excluded = {(n, m) for n, m in task["excluded"]}
    for length in plan.context_lengths:
        wanted = {n: m for n, m in methods.items() if (length, n) not in excluded}
        if all(done.has(length, n, plan.haystacks_of(n)) for n in wanted):
            continue
        ready = _prepare(parent, task, respondent, wanted, length, model)
        if ready is None:
            continue
        ask_everything(
            parent,
            respondent,
            ready.arms,
            length=length,
            haystacks={n: plan.haystacks_of(n) for n in ready.arms},
            so_far=done,
            seconds=ready.seconds,
            prompts_in_memory=ready.prompts_in_memory,
            device=device,
        )
        free_memory(device)


def own_filler(plan: AuditPlan) -> str | OwnText:
    """The filler that the plan names: one of the package's, or the text of a file."""
    if plan.filler in FILLERS:
        return plan.filler
    return OwnText(_unchanged(plan.filler, plan.filler_sha256, "--filler"))


def _unchanged(file: str, sha256: str | None, option: str) -> str:
    """The text of a file; raises ``UsageError`` unless it is what was planned with."""
    content = read_text(Path(file), option)
    found = hashlib.sha256(content.encode()).hexdigest()
    if found != sha256:
        raise UsageError(
            f"{option} {file} has changed since this audit was planned: sha256 {found[:16]}..., "
            f"was {str(sha256)[:16]}...; restore it or start anew"
        )
    return content


def _serve_text(
    parent: Parent,
    task: Message,
    plan: AuditPlan,
    model: LoadedModel,
    methods: Mapping[str, PrefillMethod],
    reader: Encoder,
) -> None:
    """The user's own text under every arm, in place of haystacks."""
    assert plan.text is not None
    content = _unchanged(plan.text, plan.text_sha256, "--text")
    texts = {n: own_text(content, reader, model, n) for n in plan.context_lengths}
    # What cannot be read ends the audit before it has a file.
    check_readable(model, texts[plan.context_lengths[0]], methods)
    parent.ask("loaded", **identity(model, methods))
    done = {(n, m) for n, _, m in task["answered"]} | {(n, m) for n, m in task["excluded"]}
    for length, text in texts.items():
        arms = {n: m for n, m in methods.items() if (length, n) not in done}
        if arms:
            of_text(parent, model, text, length, arms)


def serve_here(
    conversation: Conversation,
    model: LoadedModel | None,
    own: Mapping[str, PrefillMethod],
) -> None:
    """Hold the whole conversation in this process: methods given as objects cannot leave it."""
    parent = InProcess(conversation)
    device = resolve_device(conversation.request.device) if model is None else model.model.device
    task = parent.ask("hello", device=describe_device(device))["task"]
    serve(parent, task, device, model, own)


@dataclass(frozen=True)
class _Ready:
    """The arms that run at a length, and what a group of prompts may hold."""

    arms: dict[str, PrefillMethod]
    seconds: dict[str, float]
    """Of one prefill."""
    prompts_in_memory: int


def _prepare(
    parent: Parent,
    task: Message,
    respondent: ModelRespondent,
    methods: Mapping[str, PrefillMethod],
    length: int,
    model: LoadedModel,
) -> _Ready | None:
    """Compile and time every arm once on the first haystack, and see what it computes."""
    device = model.model.device
    prompt = respondent.prompt(0, length)
    told = (Computed.model_validate(c) for c in task["computed"])
    seen = {c.method: c for c in told if c.context_length == length}
    dense = Dense()
    ready = _Ready({}, {}, 1)
    cache_bytes = 0
    for name, asked in methods.items():
        method = asked
        parent.ask("cell", step="preparing", context_length=length, method=name)
        try:
            if isinstance(method, EqualDensity):
                if method.of not in ready.arms:
                    skip(parent, length, name, f"{method.of}, whose density it takes, did not run")
                    continue
                method = method.at(seen)
            if isinstance(method, Auto):
                deciding = Deciding(method)
                respondent.prefill(prompt, deciding)
                method = method.decided(dense, for_shorter(deciding.choices))
            # On a CPU PyTorch has one kernel worth the name, and the other takes minutes to time.
            if isinstance(method, Dense) and method.backend is None and device.type == "cuda":
                method = _fastest(parent, task, respondent, prompt, length)
            if isinstance(method, Dense):
                dense = method
            seeing = method if name in seen else _Watched(method)
            began = time.monotonic()
            show(method, prompt)
            left = respondent.prefill(prompt, seeing)
            if device.type == "cuda":  # where the first call compiles
                del left
                began = time.monotonic()
                left = respondent.prefill(prompt, method)
            synchronize(device)
            ready.seconds[name] = time.monotonic() - began
            cache_bytes = _bytes_of(left.cache) + _bytes_of(left.end_cache)
            del left
        except torch.OutOfMemoryError as error:
            skip(parent, length, name, out_of_memory(error))
            continue
        except RecallError as error:
            skip(parent, length, name, str(error))
            continue
        free_memory(device)
        ready.arms[name] = method
        if isinstance(seeing, _Watched):
            seen[name] = seeing.record(length, name)
            parent.ask("record", record=seen[name].model_dump(mode="json"))
    if not ready.arms:
        return None
    room = int(CACHE_SHARE * free_bytes(device)) // max(1, cache_bytes)
    return _Ready(ready.arms, ready.seconds, max(1, room))


def for_shorter(choices: Mapping[tuple[int, int], Choice]) -> dict[tuple[int, int], Choice]:
    """Choices that hold for all prompts of a length, by least tokens and layer.

    Where tokens are not bytes some haystacks are a little shorter than the first, and below the
    lengths that were decided ``auto`` would run dense, unasked.
    """
    return {(int(FILLED * tokens), layer): choice for (tokens, layer), choice in choices.items()}


def _fastest(
    parent: Parent, task: Message, respondent: Respondent, prompt: Prompt, length: int
) -> Dense:
    """The fastest dense kernel at this length: the one on file, or the fastest now."""
    if chosen := task["backends"].get(str(length)):
        return Dense(chosen)
    probe = TimesBackends()
    respondent.prefill(prompt, probe)
    assert probe.timings is not None
    record = Backends(
        block=0,
        context_length=length,
        dtype=task["plan"]["dtype"],
        seconds=probe.timings.seconds,
        reasons=probe.timings.reasons,
        chosen=probe.timings.fastest,
    )
    parent.ask("record", record=record.model_dump(mode="json"))
    return Dense(probe.timings.fastest)


class _Watched:
    """A method that also notes how much it computes and which attention it keeps."""

    def __init__(self, method: PrefillMethod) -> None:
        self._method = method
        self.name, self.parameters = method.name, method.parameters
        self._density: dict[int, tuple[float, ...]] = {}
        self._recall: dict[int, Tensor] = {}
        """By layer, of every head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """As the method does it."""
        # A second prefill, before an end question, is much like the first.
        if layer in self._density or not isinstance(self._method, ProfiledMethod):
            return self._method.attend(q, k, v, scale=scale, layer=layer)
        profile = self._method.profile(q, k, v, scale=scale, layer=layer)
        self._density[layer] = tuple(profile.density.tolist())
        if profile.lse is not None:
            rows = sampled_rows(q.shape[2], RECALL_ROWS)
            at = rows.to(q.device)
            dense = causal_lse(q.index_select(2, at), k, rows, scale=scale)
            try:
                kept = kept_mass(profile.lse.index_select(2, at), dense)
            except RecallError as error:
                raise RecallError(f"layer {layer}: {error}") from error
            self._recall[layer] = kept.double().mean((0, 2)).cpu()
        elif bool((profile.density == 1).all()):  # every causal pair, as dense layers have
            self._recall[layer] = torch.ones(q.shape[1], dtype=torch.float64)
        return profile.out

    def record(self, length: int, name: str) -> Computed:
        """What was noted of one prefill."""
        # By the model's own numbers: what keeps its own attention has an empty place.
        layers = range(1 + max(self._density, default=-1))
        by_layer = tuple(self._density.get(layer, ()) for layer in layers)
        # The mean of some layers is not the arm's.
        told = bool(by_layer) and self._recall.keys() == self._density.keys()
        heads = torch.cat(list(self._recall.values())) if told else None
        return Computed(
            context_length=length,
            method=name,
            density=fmean(d for layer in by_layer for d in layer) if by_layer else None,
            density_by_layer=by_layer,
            recall=None if heads is None else float(heads.mean()),
            recall_worst_head=None if heads is None else float(heads.min()),
        )


def _bytes_of(cache: Any) -> int:
    """Memory of a cache's keys and values; none without a cache."""
    return (
        0
        if cache is None
        else sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
