"""The errors a user meets. Each message says what was wrong, the value, and what to do."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command; the table is part of ``green-bench --help``."""

    PASS = 0
    REGRESSION = 1
    USAGE = 2
    INCONCLUSIVE = 3
    NOT_COMPARABLE = 4
    INVALID_MEASUREMENT = 5
    INTERRUPTED = 130
    UNREAD = 141


class GreenBenchError(Exception):
    """Base of every error that ends a command with one sentence instead of a traceback."""

    exit_code = ExitCode.USAGE


class UsageError(GreenBenchError):
    """The request or a file it names cannot be used as given."""


class MeasurementError(GreenBenchError):
    """The machine cannot measure what was asked, or a measurement came out unusable."""

    exit_code = ExitCode.INVALID_MEASUREMENT


class NotComparableError(GreenBenchError):
    """Two runs, or a run and what it resumes, differ in what makes joules comparable."""

    exit_code = ExitCode.NOT_COMPARABLE
