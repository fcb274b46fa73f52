"""The gate as a loop: measure what a baseline measured, judge, and go on while it is open.

A check is one growing run, its ledger. It is looked at when it has 6, 10 and 16 blocks; a
verdict ends it for good, and a check that is taken up again goes on where it stood.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minference_green import bench, fingerprint
from minference_green.baseline import Baseline
from minference_green.bench import Progress, Request
from minference_green.errors import NotComparableError, UsageError
from minference_green.journal import stored_request
from minference_green.results import FILE_NAME, Run, load
from minference_green.verdict import LOOKS, Outcome, Verdict, check_allowed, compare, next_look


@dataclass(frozen=True)
class Checked:
    """A verdict and the ledger it rests on."""

    directory: Path
    run: Run
    verdict: Verdict


def check(
    stored: Baseline,
    output: Path,
    progress: Progress,
    *,
    margins: Mapping[str, float],
    max_blocks: int = LOOKS[-1],
    allow_mismatch: Sequence[str] = (),
    options: Mapping[str, Mapping[str, str]] | None = None,
    resume: bool = False,
    command: Sequence[str] = (),
) -> Checked:
    """Measure again what the newest run of ``stored`` measured, until a verdict or the last look.

    ``options`` replace those of the methods they name. Ledgers lie under ``output`` by baseline
    and by the state of the repository one stands in; ``resume`` goes on with the newest there,
    if there is one, so that no ledger of other code is ever judged.

    Raises ``UsageError`` for ``max_blocks`` that is no look or a baseline that cannot be
    measured again, ``NotComparableError`` for a ledger of other code or another request, and
    as ``bench.run`` and ``compare`` do.
    """
    if max_blocks not in LOOKS:
        raise UsageError(
            f"--max-blocks {max_blocks} is no look; choose from {', '.join(map(str, LOOKS))}"
        )
    check_allowed(allow_mismatch)
    request = _request(stored, options or {}, command)
    place = output / stored.name / fingerprint.tree_name(Path.cwd())
    directory = newest(place) if resume else None
    if directory is None:
        directory = bench.run(request, place, progress)
    else:
        _refuse_other_ground(directory, request)
        bench.resume(directory, progress)
    while True:
        run = load(directory)
        verdict = compare(stored.runs, run, margin=margins, allow_mismatch=allow_mismatch)
        more = next_look(len(run.blocks_done))
        decided = verdict.outcome is not Outcome.INCONCLUSIVE or verdict.next_look is None
        if decided or more is None or more > max_blocks:
            return Checked(directory, run, verdict)
        progress.say(f"inconclusive at {len(run.blocks_done)} blocks, going on to {more}")
        reason = f"the check was inconclusive at {len(run.blocks_done)} blocks"
        bench.extend(directory, more, reason, progress)


def newest(output: Path) -> Path | None:
    """The newest run under ``output``; their names begin with the time they began."""
    found = sorted(file.parent for file in output.glob(f"*/{FILE_NAME}"))
    return found[-1] if found else None


def _request(
    stored: Baseline, options: Mapping[str, Mapping[str, str]], command: Sequence[str]
) -> Request:
    """What the newest stored run was asked to do, with windows of the same length."""
    header = stored.runs[-1].header
    if header.request.get("model") != header.workload.model:
        raise UsageError(
            f"baseline {stored.name} was not measured by green-bench run ({header.energy}, "
            f"{header.workload.model}), so check cannot repeat it"
        )
    request = stored_request(Request, header.request, header.version)
    return request.model_copy(
        update={
            "options": {**request.options, **{k: dict(v) for k, v in options.items()}},
            "blocks": LOOKS[0],
            "window_seconds": header.plan.window_seconds,
            "warmup_seconds": header.plan.warmup_seconds,
            "command": tuple(command),
        }
    )


def _refuse_other_ground(directory: Path, request: Request) -> None:
    """The package and what is under it may change while the user's repository stands still."""
    header = load(directory).header
    then, now = header.fingerprint, fingerprint.software(None)
    asked = stored_request(Request, header.request, header.version)
    commit, dirty = fingerprint.code_version()
    changed = [
        name
        for name, same in (
            ("kernels", then.kernel_hash == fingerprint.kernel_hash()),
            ("code", (then.code_commit, then.code_dirty) == (commit, dirty)),
            ("software", all(then.software.get(k) == v for k, v in now.items())),
            ("request", asked.model_copy(update={"command": request.command}) == request),
        )
        if not same
    ]
    if changed:
        raise NotComparableError(
            f"the check at {directory} was measured with other {', '.join(changed)}; "
            "start a new one: leave out --resume"
        )
