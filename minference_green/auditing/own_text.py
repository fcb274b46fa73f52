"""What methods lose of the user's own text, kind by kind, without a question or a label.

In a dense prefill every method is shown the same queries and keys, so that what its index keeps
of the attention to each kind is judged without the errors of earlier layers. Each method's own
prefill then tells how far its predictions of such tokens are from dense ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minference_green.auditing.arms import EqualDensity
from minference_green.auditing.loop import Parent, out_of_memory, skip
from minference_green.auditing.plan import DENSE, LEAST_TEXT_TOKENS
from minference_green.auditing.tags import OTHER, TAGS, tagged
from minference_green.errors import UsageError
from minference_green.faithfulness import (
    Divergences,
    class_mass,
    divergences,
    made_by_head,
    sampled_rows,
)
from minference_green.ledger import KindOfText, OfText
from minference_green.methods.auto import Auto, Deciding
from minference_green.methods.dense import Dense
from minference_green.methods.method import PrefillMethod, ProfiledMethod
from minference_green.model.attention import switched
from minference_green.model.hidden import head, tapped
from minference_green.model.loading import LoadedModel
from minference_green.model.text import Encoder, Tokens
from minference_green.torch_device import free_memory

ROWS = 256
"""Rows per layer whose attention to each kind is looked at."""

POSITIONS_OF_KIND = 256
"""Tokens of a kind, spread over the text, whose predictions are compared."""

CHARACTERS_A_TOKEN = 8
"""More than tokens hold on average, but for a text of nothing but space."""

SLACK = 256
"""Tokens behind the last one read, so that where a text is cut changes none that is."""

HEAD_TOKENS = 64
"""Tokens on which the head is tried."""

KINDS = (*TAGS, OTHER)


@dataclass(frozen=True)
class Text:
    """The user's text in tokens, each of one kind."""

    ids: Tensor
    """``[1, N]``"""
    classes: Tensor
    """``[N]``, the number of each token's kind in ``KINDS``."""

    @property
    def positions(self) -> Tensor:
        """Rows that predict the sampled tokens of every kind, ascending."""
        found = []
        for number in range(len(KINDS)):
            tokens = (self.classes[1:] == number).nonzero()[:, 0]
            found.append(
                tokens[sampled_rows(len(tokens), POSITIONS_OF_KIND)] if len(tokens) else tokens
            )
        return torch.cat(found).sort().values


def own_text(content: str, encoder: Encoder, model: LoadedModel, length: int) -> Text:
    """The first ``length`` tokens of a text, or all of a shorter one.

    A token that holds bytes of several kinds is of the first in ``KINDS``. Raises ``UsageError``
    for a text that is too short, or a length the model is not made for.
    """
    model.check_length(length)
    if length < LEAST_TEXT_TOKENS:
        raise UsageError(
            f"--context {length} reads too little of a text: at least {LEAST_TEXT_TOKENS} tokens "
            "are needed"
        )
    shift = len(encoder.opening)
    content, tokens = _beginning(content, encoder, length - shift)
    count = min(len(tokens.ids) + shift, length)
    if count < LEAST_TEXT_TOKENS:
        raise UsageError(
            f"--text is too short: {len(content)} characters, {count} tokens for {model.spec}; "
            f"at least {LEAST_TEXT_TOKENS} tokens are needed, give a longer one"
        )
    classes = torch.full((count,), KINDS.index(OTHER))
    spans = tagged(content)
    for number in reversed(range(len(TAGS))):
        for start, end in spans.get(KINDS[number], ()):
            first, last = tokens.of(start, end)
            classes[first + shift : last + shift] = number
    ids = [*encoder.opening, *tokens.ids[: count - shift]]
    return Text(torch.tensor([ids], device=model.model.device), classes)


def _beginning(content: str, encoder: Encoder, wanted: int) -> tuple[str, Tokens]:
    """As much of a text as holds ``wanted`` tokens and ``SLACK`` more, or all of it.

    The rest of a long document costs time and memory and is never read.
    """
    size = CHARACTERS_A_TOKEN * (wanted + SLACK)
    while True:
        part = content[:size]
        tokens = encoder.encode(part)
        if size >= len(content) or len(tokens.ids) >= wanted + SLACK:
            return part, tokens
        size *= 2


def check_readable(model: LoadedModel, text: Text, arms: Mapping[str, PrefillMethod]) -> None:
    """Raise ``UsageError`` for a model or an arm of which a text cannot tell anything.

    A yardstick needs a density of its own, which else a haystack tells. The model's predictions
    must be its head's over its hidden states, tried on the first tokens.
    """
    for name, method in arms.items():
        if isinstance(method, EqualDensity):
            raise UsageError(
                f"{name} takes its density from a haystack, and --text asks none; give one "
                f"with --method-option {name}.density=0.1"
            )
    made = head(model.model)
    kept: list[Tensor] = []
    with (
        torch.inference_mode(),
        tapped(model.model, layer=lambda _number, _hidden: None, last=kept.append),
    ):
        out = model.model(input_ids=text.ids[:, :HEAD_TOKENS], use_cache=False)
    if made is None or not made_by_head(kept[0][0], out.logits[0].float(), *made):
        raise UsageError(
            f"{model.spec} does more to its logits than one linear head (a scale, a soft cap), so "
            "its predictions cannot be compared; give a causal language model without"
        )


def of_text(
    parent: Parent,
    model: LoadedModel,
    text: Text,
    length: int,
    arms: Mapping[str, PrefillMethod],
) -> None:
    """Record for every arm what it loses of each kind, against dense prefill.

    Model and arms are those that :func:`check_readable` let pass.
    """
    positions = text.positions
    made = head(model.model)
    assert made is not None
    ready = {n: _ready(model, m, text, positions) for n, m in arms.items()}
    teacher = _Teacher(ready, text)
    parent.ask("cell", step="reading the text with", context_length=length, method="dense")
    reference = _last_hidden(model, teacher, text, positions)
    for name, method in ready.items():
        if name in teacher.failures:
            skip(parent, length, name, teacher.failures[name])
            continue
        parent.ask("cell", step="reading the text with", context_length=length, method=name)
        try:
            hidden = reference if name == DENSE else _last_hidden(model, method, text, positions)
        except torch.OutOfMemoryError as error:
            skip(parent, length, name, out_of_memory(error))
            continue
        finally:
            free_memory(model.model.device)
        broken = int((~(hidden.isfinite() & reference.isfinite())).any(-1).sum())
        if broken:
            reason = f"the output is not finite at {broken} of {len(hidden)} positions"
            skip(parent, length, name, reason)
            continue
        following = text.ids[0].index_select(0, (positions + 1).to(text.ids.device))
        with torch.inference_mode():
            apart = divergences(reference, hidden, made[0], following, bias=made[1])
        mass = teacher.mass.get(name)
        # What some layers keep is not what the arm keeps.
        whole = mass if mass is not None and mass.layers == teacher.layers else None
        record = OfText(
            context_length=length,
            method=name,
            tokens=text.ids.shape[1],
            kinds=_by_kind(text, positions, whole, apart),
        )
        parent.ask("record", record=record.model_dump(mode="json"))


def _ready(
    model: LoadedModel, method: PrefillMethod, text: Text, positions: Tensor
) -> PrefillMethod:
    if isinstance(method, Auto):
        deciding = Deciding(method)
        _last_hidden(model, deciding, text, positions)
        return method.decided(Dense(), deciding.choices)
    return method


@dataclass
class _Mass:
    """Attention mass by kind, summed over layers, heads and rows, float64 on the CPU."""

    layers: int = 0
    dense: Tensor = field(default_factory=lambda: torch.zeros(len(KINDS), dtype=torch.float64))
    kept: Tensor = field(default_factory=lambda: torch.zeros(len(KINDS), dtype=torch.float64))


class _Teacher:
    """Dense attention, during which every method shows what it would keep of it."""

    name = "dense"

    def __init__(self, methods: Mapping[str, PrefillMethod], text: Text) -> None:
        self.parameters: Mapping[str, str] = {}
        self.mass: dict[str, _Mass] = {}
        self.failures: dict[str, str] = {}
        self._dense = Dense()
        self.layers = 0
        self._methods = {
            n: m
            for n, m in methods.items()
            if isinstance(m, ProfiledMethod) and not isinstance(m, Dense)
        }
        self._classes = text.classes
        self._rows = sampled_rows(text.ids.shape[1], ROWS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        """Dense attention; notes what each method's index keeps of each kind."""
        at = self._rows.to(q.device)
        self.layers += 1
        for name, method in self._methods.items():
            if name in self.failures:
                continue
            try:
                profile = method.profile(q, k, v, scale=scale, layer=layer)
            except torch.OutOfMemoryError as error:
                self.failures[name] = out_of_memory(error)
                continue
            if not profile.indices and not bool((profile.density == 1).all()):
                continue
            found = class_mass(
                q.index_select(2, at), k, self._rows, self._classes, profile.indices or None,
                scale=scale, n_classes=len(KINDS),
            )  # fmt: skip
            mass = self.mass.setdefault(name, _Mass())
            mass.dense += found.dense.double().sum((0, 1, 2)).cpu()
            mass.kept += found.kept.double().sum((0, 1, 2)).cpu()
            mass.layers += 1
        return self._dense.attend(q, k, v, scale=scale, layer=layer)


@torch.inference_mode()
def _last_hidden(
    model: LoadedModel, method: PrefillMethod, text: Text, positions: Tensor
) -> Tensor:
    """Hidden states after the last norm at some positions, ``[P, width]``."""
    kept: list[Tensor] = []
    at = positions.to(model.model.device)

    def last(hidden: Tensor) -> None:
        kept.append(hidden[0].index_select(0, at).clone())

    with (
        switched(model.model, method, dense=Dense()),
        tapped(model.model, layer=lambda _number, _hidden: None, last=last),
    ):
        model.model(input_ids=text.ids, use_cache=False, logits_to_keep=1)
    return kept[0]


def _by_kind(
    text: Text, positions: Tensor, mass: _Mass | None, apart: Divergences
) -> tuple[KindOfText, ...]:
    of_next = text.classes[positions + 1]
    kinds = []
    for number, kind in enumerate(KINDS):
        tokens = int((text.classes == number).sum())
        if not tokens:
            continue
        chosen = (of_next == number).to(apart.kl.device)
        some = bool(chosen.any())
        dense = None if mass is None else float(mass.dense[number])
        kinds.append(
            KindOfText(
                kind=kind,
                tokens=tokens,
                attention=None if mass is None else float(mass.dense[number] / mass.dense.sum()),
                recall=None if mass is None or not dense else float(mass.kept[number]) / dense,
                positions=int(chosen.sum()),
                kl_nats=float(apart.kl[chosen].mean()) if some else None,
                top1_agreement=float(apart.same_top[chosen].double().mean()) if some else None,
                nll_change_nats=float(apart.nll_change[chosen].mean()) if some else None,
            )
        )
    return tuple(kinds)
