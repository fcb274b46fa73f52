"""Arms whose numbers are gone: an overflow must not cost the file, nor pass for an answer."""

import dataclasses
import math

import pytest
import torch

from minference_green.auditing.audit import InProcess, audit
from minference_green.auditing.loop import Progress, ask_everything
from minference_green.auditing.plan import AuditRequest
from minference_green.ledger import Answered, load_audit
from minference_green.render.audit import audit_document
from minference_green.results import Skip

LENGTH = 12 * 1024
NAMES = ("dense", "a-shape")


@pytest.fixture
def asked(stand_in, named, tmp_path, quiet):
    """An audit of 3 haystacks whose named arm gives some logarithm from the second one on."""

    def make(broken, logprob):
        class Overflowing(stand_in):
            def answers(self, prompt, prefilled):
                scores = super().answers(prompt, prefilled)
                if prefilled == broken and prompt.haystack.index > 0:
                    scores[2] = dataclasses.replace(scores[2], logprob=logprob)
                return scores

        def hold(conversation):
            parent = InProcess(conversation)
            parent.ask("hello", device={"kind": "cpu"})
            parent.ask(
                "loaded", model="a stand-in", revision="1", weights="trained", parameters=1,
                rest="stock", methods=[{"name": n, "parameters": {}} for n in NAMES],
            )  # fmt: skip
            ask_everything(
                parent,
                Overflowing(lambda *_: False),
                {n: named(n) for n in NAMES},
                length=LENGTH,
                haystacks=dict.fromkeys(NAMES, 3),
                so_far=Progress(frozenset(), frozenset()),
                seconds=dict.fromkeys(NAMES, 0.4),
                prompts_in_memory=2,
                device=torch.device("cpu"),
            )

        request = AuditRequest(methods=NAMES, context_lengths=(LENGTH,), haystacks=3, meter="none")
        return load_audit(audit(request, tmp_path, quiet, hold))

    return make


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_an_arm_without_finite_probabilities_is_skipped_and_the_file_stays_readable(asked, logprob):
    found = asked("a-shape", logprob)
    (skip,) = found.of(Skip)
    assert skip.method == "a-shape"
    assert skip.reason == "1 of 29 answers to haystack 1 have no finite probability"
    assert [(a.method, a.haystack) for a in found.of(Answered)] == [
        ("dense", 0), ("dense", 1), ("a-shape", 0), ("dense", 2),
    ]  # fmt: skip
    assert found.complete


def test_without_dense_answers_nothing_is_said_to_be_unanswered(asked):
    document = audit_document(asked("dense", math.nan))
    (sentence,) = document.conclusion
    assert sentence.startswith("Dense prefill could not be asked")
