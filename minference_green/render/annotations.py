"""What a check says to GitHub: workflow commands, one a line, shown beside the change."""

from collections.abc import Iterator, Sequence

from minference_green.render.verdict import reason, title
from minference_green.verdict import Outcome, Verdict

_LEVELS = {Outcome.PASS: "notice", Outcome.FAIL: "error", Outcome.INCONCLUSIVE: "warning"}


def annotations(verdict: Verdict, warnings: Sequence[str]) -> Iterator[str]:
    """One annotation per judged criterion that did not simply pass, and per warning."""
    for criterion in verdict.criteria:
        if criterion.judged and (criterion.outcome is not Outcome.PASS or criterion.improved):
            level = _LEVELS[criterion.outcome]
            yield annotation(level, title(criterion), reason(criterion))
    for warning in warnings:
        yield annotation("warning", "green-bench", warning)


def annotation(level: str, title_: str, message: str) -> str:
    """One workflow command, with what would end it early escaped."""
    return f"::{level} title={_property(title_)}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
