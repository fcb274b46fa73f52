"""Whether two runs may be compared, and what differs between them.

Hard keys make joules incomparable. Subject keys are what a comparison is there to judge and
never refuse. Soft keys are printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from minference_green.results import SCHEMA, Backends, Run, Window
from minference_green.stats import method_names
from minference_green.workload import format_length

HARD_KEYS = (
    "device",
    "memory",
    "mig_profile",
    "power_limit",
    "model",
    "revision",
    "weights",
    "dtype",
    "workload",
    "rest",
    "reference",
    "energy",
    "schema",
)


@dataclass(frozen=True)
class Difference:
    """One key on which two runs differ."""

    key: str
    then: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.then} -> {self.now}"


@dataclass(frozen=True)
class Differences:
    """All keys on which two runs differ, by what they mean for a comparison."""

    hard: tuple[Difference, ...]
    subject: tuple[Difference, ...]
    soft: tuple[Difference, ...]


def differences(then: Run, now: Run) -> Differences:
    """Everything of the two runs' fingerprints that differs."""
    return Differences(
        _differing(_hard(then), _hard(now)),
        _differing(_subject(then), _subject(now)),
        _differing(_soft(then), _soft(now)),
    )


def _differing(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[Difference, ...]:
    return tuple(
        Difference(key, then.get(key, "absent"), now.get(key, "absent"))
        for key in dict.fromkeys([*then, *now])
        if then.get(key, "absent") != now.get(key, "absent")
    )


def _hard(run: Run) -> dict[str, str]:
    header, print_ = run.header, run.header.fingerprint
    devices = [d for d in print_.devices if d.kind == "gpu"] or list(print_.devices)
    # Drivers differ by some MiB in the memory they report of one and the same card.
    memory = [None if d.memory_bytes is None else round(d.memory_bytes / 2**30) for d in devices]
    limits = [None if d.power_limit_watts is None else round(d.power_limit_watts) for d in devices]
    obtained = {w.obtained for w in run.of(Window) if w.valid}
    values = (
        " + ".join(d.name for d in devices),
        " + ".join("unknown" if m is None else f"{m} GiB" for m in memory),
        " + ".join(d.mig_profile or "none" for d in devices),
        " + ".join("unknown" if w is None else f"{w} W" for w in limits),
        print_.model,
        print_.model_revision,
        print_.weights,
        print_.dtype,
        print_.workload_hash,
        print_.rest,
        method_names(run)[0],
        " + ".join(sorted(obtained)) or "none",
        header.schema_version.split(".")[0] if header.schema_version else SCHEMA,
    )
    return dict(zip(HARD_KEYS, values, strict=True))


def _subject(run: Run) -> dict[str, str]:
    header, print_ = run.header, run.header.fingerprint
    return {
        "kernels": print_.kernel_hash,
        **{
            f"parameters of {m.name}": str(dict(sorted(m.parameters.items())))
            for m in header.methods
        },
        **{
            f"dense backend at {format_length(b.context_length)}": b.chosen
            for b in run.of(Backends)
        },
        "code": f"{print_.code_commit or 'unknown'}{' with changes' if print_.code_dirty else ''}",
        **print_.software,
    }


def _soft(run: Run) -> dict[str, str]:
    print_ = run.header.fingerprint
    celsius = [
        s.temperature_celsius
        for w in run.windows[:1]
        for s in w.before
        if s.temperature_celsius is not None
    ]
    return {
        "driver": " + ".join(d.driver for d in print_.devices if d.driver) or "unknown",
        "doctor": " + ".join(d.outcome for d in print_.doctor) or "not examined",
        "cpu": print_.cpu,
        "host": print_.hostname_hash,
        "start temperature": " + ".join(f"{c:.0f} C" for c in celsius) or "unknown",
    }
