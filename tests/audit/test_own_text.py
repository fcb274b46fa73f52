"""What is lost of a text of the user's own: attention and predictions by kind."""

import pytest
import torch

from minference_green.auditing.arms import EqualDensity, noise_floor
from minference_green.auditing.own_text import KINDS, check_readable, of_text, own_text
from minference_green.errors import UsageError
from minference_green.methods.dense import Dense
from minference_green.methods.patterns import AShape
from minference_green.methods.sparse import uniform
from minference_green.model.attention import switched
from minference_green.model.loading import load
from minference_green.model.text import Bytes, Tokens

TEXT = (
    "The pump of Rothai moved 12.5 kg on 2024-02-29, not before; see /etc/pump.d/a.cfg and "
    "parse_line for 4821 others, said Anna Brel. A plain sentence follows it. "
) * 12

ENCODER = Bytes((256,))


class Told:
    """A parent that keeps what it is told."""

    def __init__(self):
        self.records = []

    def ask(self, type_, **fields):
        if type_ == "record":
            self.records.append(fields["record"])
        return {}


@pytest.fixture(scope="module")
def model():
    return load("embedded", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def text(model):
    return own_text(TEXT, ENCODER, model, 1500)


@pytest.fixture(scope="module")
def records(model, text):
    parent = Told()
    methods = {
        "dense": Dense(),
        "a-shape": uniform("a-shape", AShape(8, 64)),
        "noise-floor": noise_floor(),
    }
    of_text(parent, model, text, 1500, methods)
    return {r["method"]: {k["kind"]: k for k in r["kinds"]} for r in parent.records}


def test_every_token_is_of_the_kind_of_its_bytes(text):
    ids, classes = text.ids[0].tolist(), text.classes.tolist()
    assert len(ids) == len(classes) == 1500
    pairs = zip(ids, classes, strict=True)
    shown = "".join(chr(i) if KINDS[c] == "path" else " " for i, c in pairs)
    assert set(shown.split()) >= {"/etc/pump.d/a.cfg"}
    assert KINDS[classes[0]] == "other"  # the model's first token


def test_a_token_of_two_kinds_is_of_the_first(model):
    class Pairs:
        """Tokens of two bytes."""

        opening, bytes_per_token = (), 0

        def encode(self, text):
            n = len(text.encode())
            return Tokens([65] * (n // 2), range(0, n, 2), range(2, n + 1, 2))

    content = "ab 42 " + "/x/y" + " words go on " * 400
    assert len(content) % 2 == 0
    found = own_text(content, Pairs(), model, 1100)
    kinds = [KINDS[c] for c in found.classes[:5].tolist()]
    assert kinds == ["other", "integer", "integer", "path", "path"]


def test_what_computes_all_keeps_all_and_dense_itself_differs_in_nothing(records):
    for kind in records["noise-floor"].values():
        assert kind["recall"] == pytest.approx(1.0, abs=1e-5)
        assert kind["kl_nats"] == pytest.approx(0.0, abs=1e-5)
    for kind in records["dense"].values():
        assert kind["kl_nats"] == 0.0
        assert kind["top1_agreement"] == 1.0


def test_a_window_keeps_less_and_predicts_otherwise(records):
    kinds = records["a-shape"]
    assert all(0 <= k["recall"] <= 1 + 1e-6 for k in kinds.values())
    assert min(k["recall"] for k in kinds.values()) < 0.95
    assert max(k["kl_nats"] for k in kinds.values()) > 1e-3


def test_shares_of_attention_add_up_to_all_of_it(records):
    for method in ("a-shape", "noise-floor"):
        shares = [k["attention"] for k in records[method].values()]
        assert sum(shares) == pytest.approx(1.0)
    a, b = records["a-shape"], records["noise-floor"]
    assert {k: v["attention"] for k, v in a.items()} == pytest.approx(
        {k: v["attention"] for k, v in b.items()}
    )


def test_recall_of_a_kind_is_the_mass_of_its_tokens_in_the_attention_matrix(model, text, records):
    """Hand reckoning with whole softmax matrices and the window's own mask, in float64."""
    from minference_green.auditing.own_text import ROWS
    from minference_green.faithfulness import sampled_rows

    n = text.ids.shape[1]
    rows = sampled_rows(n, ROWS)
    dense_mass, kept_mass = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    member = torch.nn.functional.one_hot(text.classes, len(KINDS)).double()
    window = uniform("a-shape", AShape(8, 64))

    class Looking(Dense):
        def attend(self, q, k, v, *, scale, layer):
            (index,) = window.profile(q, k, v, scale=scale, layer=layer).indices
            mask = index.mask(n, n)
            kk = k.repeat_interleave(q.shape[1] // k.shape[1], 1).double()
            scores = q.double()[:, :, rows] @ kk.transpose(-1, -2) * scale
            causal = torch.arange(n)[None, :] <= rows[:, None]
            a = torch.softmax(scores.masked_fill(~causal, -torch.inf), -1)
            dense_mass.add_((a @ member).sum((0, 1, 2)).float())
            kept_mass.add_(((a * mask[:, :, rows]) @ member).sum((0, 1, 2)).float())
            return super().attend(q, k, v, scale=scale, layer=layer)

    with torch.inference_mode(), switched(model.model, Looking(), dense=Dense()):
        model.model(input_ids=text.ids, use_cache=False, logits_to_keep=1)
    for number, kind in enumerate(KINDS):
        if kind in records["a-shape"]:
            expected = float(kept_mass[number] / dense_mass[number])
            assert records["a-shape"][kind]["recall"] == pytest.approx(expected, abs=1e-4)


def test_a_method_that_shows_no_index_still_has_its_predictions_compared(model, text):
    class Bare:
        """Only what every method must have."""

        name, parameters = "bare", ()

        def attend(self, q, k, v, *, scale, layer):
            return Dense().attend(q, k, v, scale=scale, layer=layer)

    parent = Told()
    of_text(parent, model, text, 1500, {"bare": Bare()})
    (record,) = parent.records
    assert all(k["recall"] is None and k["attention"] is None for k in record["kinds"])
    assert all(k["kl_nats"] == 0.0 for k in record["kinds"])


def test_an_arm_out_of_memory_is_skipped_and_the_others_go_on(model, text):
    class Greedy:
        name, parameters = "greedy", ()

        def attend(self, q, k, v, *, scale, layer):
            raise torch.OutOfMemoryError("Tried to allocate 99 GiB")

    parent = Told()
    of_text(parent, model, text, 1500, {"greedy": Greedy(), "dense": Dense()})
    assert [r["event"] for r in parent.records] == ["skip", "of_text"]


def test_a_text_shorter_than_the_least_is_refused(model):
    told = "--text is too short: 11 characters, 12 tokens for embedded; at least 1024 tokens"
    with pytest.raises(UsageError, match=f"{told} are needed, give a longer one"):
        own_text("eleven byte", ENCODER, model, 4096)
    with pytest.raises(UsageError, match=r"--context 512 reads too little .* at least 1024"):
        own_text(TEXT, ENCODER, model, 512)


@pytest.mark.parametrize("width", [1, 3, 40])
def test_what_follows_the_tokens_that_are_read_is_never_looked_at(model, width):
    """However many characters a token holds, and the tokens are those of the whole text."""

    class Wide:
        """Tokens of some characters each."""

        opening, bytes_per_token = (256,), 0
        longest = 0

        def encode(self, text):
            self.longest = max(self.longest, len(text))
            starts = range(0, len(text), width)
            return Tokens(
                [ord(text[i]) for i in starts], starts, [min(i + width, len(text)) for i in starts]
            )

    content, wide = "pump 42 of Rothai, " * 50_000, Wide()
    found = own_text(content, wide, model, 1100)
    assert found.ids[0].tolist() == [256, *(ord(content[width * i]) for i in range(1099))]
    assert wide.longest < 100_000 < len(content)


def test_a_yardstick_without_a_density_is_refused(model, text):
    with pytest.raises(UsageError, match=r"--method-option oracle\.density=0\.1"):
        check_readable(model, text, {"oracle": EqualDensity("oracle", "a-shape", 0)})
