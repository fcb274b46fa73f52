"""The audit's parent: it owns the meters, the file and Ctrl-C, and never imports torch.

A worker process holds the model and asks the questions; with methods given as objects the same
conversation is held inside this process.
"""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

import minference_green
from minference_green.auditing.plan import AuditRequest, arms_asked, resolve
from minference_green.channel import Message, WorkerProcess
from minference_green.errors import (
    ExitCode,
    GreenBenchError,
    NotComparableError,
    UsageError,
)
from minference_green.journal import Journal, Seal, stored_request
from minference_green.ledger import (
    EVENT,
    FILE_NAME,
    Answered,
    Asked,
    Audit,
    AuditHeader,
    AuditPlan,
    Computed,
    Event,
    OfText,
    Spent,
    load_audit,
)
from minference_green.parent import (
    LOG_NAME,
    Cell,
    Metering,
    changes,
    converse,
    failure,
    fingerprint_of,
    killed_in,
    new_journal,
    terminate_as_interrupt,
    timestamp,
)
from minference_green.results import (
    Backends,
    MethodSpec,
    Skip,
)
from minference_green.validity import distrusted, doubts
from minference_green.workload import Workload, format_length

Serve = Callable[["Conversation"], None]
"""Holds the conversation to its end, with a worker process or in this one."""


class Progress(Protocol):
    """Where an audit tells how far it is."""

    def begin(self, done: int, of: int) -> None:
        """So many of all answers are on file; an answer is one haystack under one arm."""

    def say(self, message: str) -> None:
        """What is happening now."""

    def advance(self) -> None:
        """One more answer is on disk."""


class InterruptedAuditError(GreenBenchError):
    """The user stopped the audit; what is answered is on disk."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, directory: Path, *, has_answers: bool) -> None:
        go_on = (
            f"answers are kept. Go on with: green-bench audit --resume {quote(str(directory))}"
            if has_answers
            else "nothing had been answered yet"
        )
        super().__init__(f"interrupted; {go_on}")
        self.directory = directory
        self.has_answers = has_answers


def audit(
    request: AuditRequest, output: Path, progress: Progress, serve: Serve | None = None
) -> Path:
    """Audit into a new directory under ``output``; returns that directory.

    Raises ``UsageError`` for what cannot be asked, ``MeasurementError`` for what cannot be
    measured, ``InterruptedAuditError`` on Ctrl-C; answers given by then are on disk.
    """
    resolve(request, "gpu")  # what is contradictory is so on every device
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    directory = output / f"audit-{stamp}-{secrets.token_hex(2)}"
    with new_journal(directory / FILE_NAME) as journal:
        Conversation(request, directory, journal, None, progress).run(serve)
    return directory


def resume(directory: Path, progress: Progress, serve: Serve | None = None) -> Path:
    """Go on with an unfinished audit until every arm has answered; returns ``directory``.

    Raises as :func:`audit` does, and ``NotComparableError`` where machine, model or code are not
    what the audit began with.
    """
    if not (directory / FILE_NAME).is_file():
        raise UsageError(
            f"there is no audit at {directory}; give the directory of an interrupted one"
        )
    with Journal(directory / FILE_NAME) as journal:
        so_far = load_audit(directory)
        header = so_far.header
        request = stored_request(AuditRequest, header.request, header.version)
        Conversation(request, directory, journal, so_far, progress).run(serve)
    return directory


class Conversation:
    """One audit in progress: what its file holds, and the answers to whoever holds the model."""

    def __init__(
        self,
        request: AuditRequest,
        directory: Path,
        journal: Journal,
        so_far: Audit | None,
        progress: Progress,
    ) -> None:
        self.request, self.directory, self.journal = request, directory, journal
        self.header = so_far.header if so_far else None
        self.events: list[Event] = list(so_far.events) if so_far else []
        self.progress = progress
        self.plan: AuditPlan | None = self.header.plan if self.header else None
        self.cell: Cell | None = None
        self._metering = Metering(request.meter, allow_shared=request.allow_shared)
        self._device: Message = {}

    def run(self, serve: Serve | None) -> None:
        """Hold the conversation until every arm has answered, then seal the file."""
        try:
            with terminate_as_interrupt():
                while not self._complete:
                    before = len(self.events)
                    (serve or serve_worker)(self)
                    assert len(self.events) > before, "nothing was asked, and not all answered"
                if not (self.events and isinstance(self.events[-1], Seal)):
                    self.events.append(self.journal.seal())
        except KeyboardInterrupt:
            answers = any(isinstance(e, Answered | OfText) for e in self.events)
            raise InterruptedAuditError(self.directory, has_answers=answers) from None
        finally:
            self._metering.close()

    @property
    def _complete(self) -> bool:
        if self.header is None:
            return False
        return Audit(header=self.header, events=tuple(self.events)).complete

    def record(self, event: Event) -> None:
        """Put a record on disk and in memory."""
        # Memory first: Ctrl-C while the disk is waited for must not forget what is on it.
        self.events.append(event)
        self.journal.append(event)

    def answer(self, message: Message) -> Message:
        """What the holder of the model gets back for a message."""
        match message["type"]:
            case "hello":
                self._device = message["device"]
                self._metering.open(self._device)
                self._metering.begin()
                return {"task": self._task()}
            case "loaded":
                self._identify(message)
            case "cell":
                self.cell = (message["context_length"], message["method"])
                length = format_length(message["context_length"])
                self.progress.say(f"{message['step']} {message['method']} at {length}")
            case "ready":
                self._metering.begin()
            case "spent":
                self.record(self._spent(message))
            case "record":
                self.record(EVENT.validate_python(message["record"]))
                if message["record"]["event"] in ("answered", "of_text"):
                    self.progress.advance()
            case "error" | "crash":
                raise failure(message, self.directory / LOG_NAME)
            case unknown:
                raise AssertionError(unknown)
        return {}

    def _task(self) -> Message:
        if self.plan is None:
            self.plan = resolve(self.request, self._device["kind"])
        events = self.events
        answers = [e for e in events if isinstance(e, Answered)]
        return {
            "model": self.request.model,
            "methods": arms_asked(self.request.methods),
            "options": self.request.options,
            "allow_longer": self.request.allow_longer,
            "plan": self.plan.model_dump(mode="json"),
            "asked": [(e.context_length, e.haystack) for e in events if isinstance(e, Asked)],
            "answered": [
                *((e.context_length, e.haystack, e.method) for e in answers),
                *((e.context_length, 0, e.method) for e in events if isinstance(e, OfText)),
            ],
            "computed": [e.model_dump(mode="json") for e in events if isinstance(e, Computed)],
            "backends": {e.context_length: e.chosen for e in events if isinstance(e, Backends)},
            "excluded": [(e.context_length, e.method) for e in events if isinstance(e, Skip)],
        }

    def _identify(self, loaded: Message) -> None:
        """Write the header, or refuse to go on with an audit whose ground has changed."""
        assert self.plan is not None
        workload = _workload(self.request, self.plan)
        found = fingerprint_of(self._device, loaded, workload, self._metering)
        if self.header is None:
            self.header = AuditHeader(
                audit_id=self.directory.name,
                created_at=timestamp(),
                version=minference_green.__version__,
                command=self.request.command,
                fingerprint=found,
                methods=tuple(MethodSpec(**m) for m in loaded["methods"]),
                plan=self.plan,
                energy=self._metering.description,
                request=self.request.model_dump(mode="json"),
            )
            self.journal.append(self.header)
        elif changed := changes(self.header.fingerprint, found):
            raise NotComparableError(
                f"audit {self.header.audit_id} cannot go on here: {'; '.join(changed)}. "
                "Start a new audit, or return to what was."
            )
        so_far = Audit(header=self.header, events=tuple(self.events))
        self.progress.begin(so_far.answers_done, so_far.answers_planned)

    def _spent(self, message: Message) -> Spent:
        """A stretch as a record; one whose energy cannot be read is kept as invalid.

        The second such stretch in a row ends the audit.
        """
        start, end = message["start"], message["end"]
        readings, unread = self._metering.end_or_reason(start, end)
        before, after = self._metering.before, self._metering.state()
        untrusted = distrusted(self.header.fingerprint) if self.header else {}
        valid, reasons = doubts(end - start, None, readings, before, after, untrusted)
        return Spent(
            what=message["what"],
            context_length=message.get("context_length"),
            method=message.get("method"),
            prompts=message.get("prompts", 0),
            tokens=message.get("tokens", 0),
            start_seconds=start,
            end_seconds=end,
            readings=readings,
            before=before,
            after=after,
            valid=valid and not unread,
            # Short ones are told from their times: here none can be made longer by an option.
            reasons=(*unread, *(r for r in reasons if not r.startswith("short:"))),
        )


def serve_worker(conversation: Conversation) -> None:
    """Hold the conversation with a new worker process; it is over when that is done or dead."""
    worker = WorkerProcess("minference_green.auditing.worker", conversation.directory / LOG_NAME)
    # What the report will be computed with, two seconds of it, while the worker imports its own.
    import_module("scipy.stats")
    try:
        converse(worker, conversation.request.device, conversation.answer)
    except (EOFError, BrokenPipeError):
        conversation.record(killed_in(conversation.cell, 0, worker))
    finally:
        worker.stop()


def _workload(request: AuditRequest, plan: AuditPlan) -> Workload:
    """The plan as what a fingerprint holds of it; its hash covers all that changes the prompts."""
    prompt, sha256 = _prompts(plan), plan.filler_sha256
    if plan.text is not None:
        prompt, sha256 = plan.text, plan.text_sha256
    return Workload(
        model=request.model,
        context_lengths=plan.context_lengths,
        dtype=plan.dtype,
        seed=plan.seed,
        prompt=prompt,
        prompt_sha256=sha256,
    )


def _prompts(plan: AuditPlan) -> str:
    asked = f"{plan.haystacks} haystacks of {plan.inside} + {plan.after} + {plan.end} questions"
    kinds = ",".join(plan.kinds)
    return f"{asked} on {kinds} among {plan.competitors} others of a kind, in {plan.filler}"


class InProcess:
    """The holder of the model in this process: what it asks is answered at once."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def ask(self, type_: str, **fields: Any) -> Message:
        """Tell the parent something; its answer."""
        return self._conversation.answer({"type": type_, **fields})
