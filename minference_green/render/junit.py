"""A verdict as JUnit XML, which CI systems show beside other tests."""

import re
from xml.etree import ElementTree

from minference_green.render.verdict import reason, title
from minference_green.verdict import Outcome, Verdict

SUITE = "green-bench check"

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(verdict: Verdict, *, open_is_error: bool) -> str:
    """One test case per judged criterion; an open one is an error, or skipped."""
    suite = ElementTree.Element("testsuite", name=SUITE)
    for criterion in verdict.criteria:
        if not criterion.judged:
            continue
        case = _case(suite, title(criterion))
        match criterion.outcome:
            case Outcome.FAIL:
                _say(case, "failure", criterion.reason, reason(criterion))
            case Outcome.INCONCLUSIVE if open_is_error:
                _say(case, "error", criterion.reason, reason(criterion))
            case Outcome.INCONCLUSIVE:
                _say(case, "skipped", criterion.reason, reason(criterion))
    return _text(suite)


def junit_of_error(kind: str, message: str) -> str:
    """A check that came to no verdict at all."""
    suite = ElementTree.Element("testsuite", name=SUITE)
    _say(_case(suite, "verdict"), "error", kind, message)
    return _text(suite)


def _case(suite: ElementTree.Element, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname="green-bench", name=name)


def _say(case: ElementTree.Element, tag: str, kind: str, message: str) -> None:
    message = _NOT_XML.sub("?", message)
    said = ElementTree.SubElement(case, tag, message=message)
    if tag != "skipped":
        said.set("type", kind)


def _text(suite: ElementTree.Element) -> str:
    suite.set("tests", str(len(suite)))
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"
