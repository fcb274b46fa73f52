"""What a report says of lost attention and output, and that older runs stay as they were."""

import csv
import io
import json

import pytest

from minference_green.render.conclusion import conclusion
from minference_green.render.document import document
from minference_green.render.export import as_csv, as_json, records
from minference_green.render.markdown import markdown
from minference_green.render.numbers import fraction
from minference_green.render.table import plain
from minference_green.results import Divergence, Faithfulness, Observation, Recall, Run, load

LOST = Faithfulness(
    prompt=Divergence(
        positions=2048, kl_nats=0.0123, js_nats=0.003, top1_agreement=0.984, nll_change_nats=0.05
    ),
    last_rows=Divergence(
        positions=64, kl_nats=0.0007, js_nats=0.0001, top1_agreement=1.0, nll_change_nats=None
    ),
    beyond_whole_rows=Divergence(
        positions=1800, kl_nats=0.0145, js_nats=0.004, top1_agreement=0.98, nll_change_nats=0.06
    ),
    whole_rows=7104,
    kl_nats_by_decile=(0.0, *(0.01,) * 8, None),
    layers=(0, 2),
    rows=256,
    recall=Recall(by_head=((0.99, 0.98), (1.0, 0.71)), by_decile=((1.0,) * 10, (0.84,) * 10)),
    recall_in_situ=Recall(
        by_head=((0.99, 0.98), (0.96, 0.63)), by_decile=((1.0,) * 10, (0.8,) * 10)
    ),
    output_error=(0.021, 0.084),
    residual_cosine=(0.99991, 0.9983),
)


@pytest.fixture
def observed(six_blocks: Run):
    """The run as it is after an observation of its sparse arm said something."""

    def make(**update: object) -> Run:
        events = tuple(
            e.model_copy(update=update)
            if isinstance(e, Observation) and e.method != "dense" and e.block == 0
            else e
            for e in six_blocks.events
        )
        return six_blocks.model_copy(update={"events": events})

    return make


def test_terminal_and_markdown_show_the_same_row_of_losses(observed):
    run = observed(faithfulness=LOST)
    row = next(line for line in plain(document(run)).splitlines() if "0.012" in line)
    want = "8k minference 0.012 0.015 0.00070 0.050 0.920 0.71 0.89 8.4 % 0.9983"
    assert row.split() == want.split()
    assert want.replace(" %", "%").split() == [
        cell.replace(" ", "")
        for line in markdown(document(run)).splitlines()
        if line.startswith("| 8k | minference | 0.012")
        for cell in line.strip("| ").split(" | ")
    ]


def test_the_conclusion_says_in_one_line_what_the_output_lost(observed):
    (sentence,) = conclusion(observed(faithfulness=LOST))
    told = "top-1 agreement 98.4 %, KL 0.012 nats, recall 0.920 mean / 0.71 worst head."
    assert told in sentence
    (sentence,) = conclusion(observed(faithfulness=LOST.model_copy(update={"recall": None})))
    assert "KL 0.012 nats, recall not known." in sentence


def test_what_is_not_known_has_its_reason_as_a_footnote(observed):
    unknown = {"recall": None, "recall_in_situ": None, "recall_reason": "it does not tell"}
    text = plain(document(observed(faithfulness=LOST.model_copy(update=unknown))))
    assert "it does not tell" in text
    row = next(line for line in text.splitlines() if "0.00070" in line)
    assert row.split()[6] == "n/a"
    text = plain(document(observed(faithfulness_reason="the head is not plain")))
    assert "the head is not plain" in text
    assert "Faithfulness to dense" in text


def test_json_has_every_layer_and_csv_a_few_figures(observed):
    run = observed(faithfulness=LOST)
    of_8k, of_32k = json.loads(as_json(run))["faithfulness"]
    assert (of_8k["context_length_tokens"], of_8k["method"]) == (8192, "minference")
    assert of_32k["recall"]["by_head"] == [[0.99, 0.98], [1.0, 0.71]]
    assert of_8k["kl_nats_by_decile"][-1] is None
    dense, sparse, *_ = csv.DictReader(io.StringIO(as_csv(run)))
    assert (sparse["kl_nats"], sparse["kl_nats_last_rows"]) == ("0.0123", "0.0007")
    assert (sparse["recall_worst_head"], sparse["faithfulness_reason"]) == ("0.71", "")
    assert dense["kl_nats"] == ""
    (cell, *_) = records(observed(faithfulness_reason="the head is not plain"))[1:]
    assert (cell["recall"], cell["faithfulness_reason"]) == (None, "the head is not plain")


def test_a_run_from_before_shows_nothing_of_it(six_blocks):
    text = plain(document(six_blocks))
    assert "Faithfulness" not in text
    assert "KL" not in text
    assert json.loads(as_json(six_blocks))["faithfulness"] == []


def test_the_record_survives_the_file(observed, store):
    run = load(store(observed(faithfulness=LOST)))
    assert [o.faithfulness for o in run.of(Observation) if o.faithfulness] == [LOST, LOST]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a"), (0.712, "0.71"), (0.9, "0.90"), (0.98765, "0.988"), (0.99996, "0.999960"),
     (1.0, "1.0"), (0.0, "0.00"), (1.00004, "1.000040"), (0.9999999999, "1.000000")],
)  # fmt: skip
def test_a_share_near_one_shows_how_near(value: float | None, text: str) -> None:
    assert fraction(value) == text
