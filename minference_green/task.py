"""What the parent asks of one worker."""

from dataclasses import dataclass
from typing import Any

from minference_green.results import Decision
from minference_green.workload import Workload


@dataclass(frozen=True)
class Task:
    """What the parent asks of one worker."""

    block: int
    workload: Workload
    methods: tuple[str, ...]
    options: dict[str, dict[str, str]]
    allow_longer: bool
    rest: str
    """``stock`` or ``fused``: everything of the model but attention."""
    window_seconds: float
    warmup_seconds: float
    decode_tokens: int
    breakdown: bool
    idle_seconds: float
    backends: dict[int, str]
    """Dense backend already chosen, by context length."""
    decisions: tuple[Decision, ...]
    """What an arm that chooses has chosen in an earlier block."""
    observed: tuple[tuple[int, str], ...]
    """Cells whose observation is on file."""
    excluded: tuple[tuple[int, str], ...]
    """Cells not to run: an earlier worker died in them."""

    @classmethod
    def from_message(cls, fields: dict[str, Any]) -> "Task":
        """Rebuild from JSON."""
        workload = dict(fields["workload"])
        workload["context_lengths"] = tuple(workload["context_lengths"])
        return cls(
            block=fields["block"],
            workload=Workload(**workload),
            methods=tuple(fields["methods"]),
            options=fields["options"],
            allow_longer=fields["allow_longer"],
            rest=fields["rest"],
            window_seconds=fields["window_seconds"],
            warmup_seconds=fields["warmup_seconds"],
            decode_tokens=fields["decode_tokens"],
            breakdown=fields["breakdown"],
            idle_seconds=fields["idle_seconds"],
            backends={int(k): v for k, v in fields["backends"].items()},
            decisions=tuple(Decision.model_validate(d) for d in fields["decisions"]),
            observed=tuple((n, m) for n, m in fields["observed"]),
            excluded=tuple((n, m) for n, m in fields["excluded"]),
        )
