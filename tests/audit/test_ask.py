"""A small real model asked over its cache gives what one whole pass gives."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minference_green.auditing.ask import FILLED, ModelRespondent, Prompt, lay_out, show
from minference_green.auditing.score import Probe, score
from minference_green.corpus.haystack import haystack
from minference_green.corpus.recipe import Recipe
from minference_green.errors import UsageError
from minference_green.methods.dense import Dense
from minference_green.model.loading import LoadedModel
from minference_green.model.text import Bytes, Fast

RECIPE = Recipe(inside=2, after=3, end=1, competitors=0)
LENGTH = 1300


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=256,
    )  # fmt: skip
    network = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    return LoadedModel(
        model=network, spec="tiny", revision="1", weights="trained", parameters=1,
        max_context=2048, vocabulary=320, bos=256, patterns=None, allow_longer=False,
        directory=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def respondent(model: LoadedModel) -> ModelRespondent:
    return ModelRespondent(model, Bytes((256,)), 0, "prose", RECIPE)


@pytest.fixture(scope="module")
def prompt(respondent: ModelRespondent) -> Prompt:
    return respondent.prompt(0, LENGTH)


def whole(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Logits of every position, by one stock pass without a cache."""
    with torch.inference_mode():
        return model.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def test_a_prompt_is_exactly_as_long_as_asked(prompt: Prompt) -> None:
    assert prompt.ids[0, 0] == 256
    assert prompt.end is not None
    assert prompt.ids.shape[1] + len(prompt.end.before) == LENGTH
    assert prompt.n_tokens == prompt.ids.shape[1] + LENGTH


def test_every_inside_answer_is_predicted_by_the_rows_before_it(prompt: Prompt) -> None:
    text, at = prompt.haystack.text, 0
    for ready in prompt.inside:
        answer = ready.question.answer.encode()
        rows = prompt.rows[at : at + len(ready.probe.answer)]
        at += len(rows)
        assert bytes(prompt.ids[0, rows + 1].tolist()) == answer == bytes(ready.probe.answer)
        assert text[ready.question.answer_start :].startswith(answer)


def test_spans_lead_from_bytes_to_the_tokens_that_hold_them(prompt: Prompt) -> None:
    for fact in prompt.haystack.facts:
        for mention in fact.mentions:
            first, last = prompt.spans(mention.start, mention.end)
            assert bytes(prompt.ids[0, first:last].tolist()).decode() == mention.value


def test_answers_over_the_cache_are_those_of_one_whole_pass(
    model: LoadedModel, respondent: ModelRespondent, prompt: Prompt
) -> None:
    found = respondent.answers(prompt, respondent.prefill(prompt, Dense()))
    ids = prompt.ids[0].tolist()
    expected = score(whole(model, ids)[prompt.rows], [r.probe for r in prompt.inside])
    assert prompt.end is not None
    for ready in (prompt.end, *prompt.after):
        answer = ready.probe.answer
        tokens = [*ids, *ready.before, *answer[:-1]]
        expected += score(whole(model, tokens)[-len(answer) :], [ready.probe])
    assert len(found) == len(expected) == 6
    for ours, one_pass in zip(found, expected, strict=True):
        assert ours.right == one_pass.right
        assert ours.logprob == pytest.approx(one_pass.logprob, abs=1e-4)
        assert ours.margin == pytest.approx(one_pass.margin, abs=1e-4)


def test_questions_after_a_prompt_do_not_see_each_other(
    respondent: ModelRespondent, prompt: Prompt
) -> None:
    forth = respondent.answers(prompt, respondent.prefill(prompt, Dense()))
    turned = dataclasses.replace(prompt, after=prompt.after[::-1])
    back = respondent.answers(turned, respondent.prefill(turned, Dense()))
    assert [s.logprob for s in forth[3:]] == [s.logprob for s in back[3:]][::-1]


def test_a_right_answer_is_what_greedy_decoding_writes(
    model: LoadedModel, respondent: ModelRespondent, prompt: Prompt
) -> None:
    ready = prompt.after[0]
    tokens = [*prompt.ids[0].tolist(), *ready.before]
    written: list[int] = []
    for _ in range(4):
        written.append(int(whole(model, [*tokens, *written])[-1].argmax()))
    other = (written[0], written[1], (written[2] + 1) % 256, written[3])
    answers = [Probe(tuple(written)), Probe(other)]
    after = tuple(dataclasses.replace(ready, probe=p) for p in answers)
    asked = dataclasses.replace(prompt, after=after)
    right, wrong = respondent.answers(asked, respondent.prefill(asked, Dense()))[3:]
    assert right.right
    assert (wrong.first_right, wrong.rest_right) == (True, False)


class Late(Dense):
    """Sees a prompt's own token and nothing else; a continuation is served as it should be."""

    def attend(self, q, k, v, *, scale, layer):
        assert q.shape[2] == k.shape[2], "only whole prompts are the method's"
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def test_only_the_prompt_is_the_methods_and_its_questions_are_dense(
    respondent: ModelRespondent, prompt: Prompt
) -> None:
    dense = respondent.answers(prompt, respondent.prefill(prompt, Dense()))
    late = respondent.answers(prompt, respondent.prefill(prompt, Late()))
    changed = [a.logprob != b.logprob for a, b in zip(dense, late, strict=True)]
    assert all(changed)


def test_without_an_end_question_the_text_fills_the_prompt(model: LoadedModel) -> None:
    recipe = dataclasses.replace(RECIPE, end=0)
    asked = ModelRespondent(model, Bytes((256,)), 0, "prose", recipe).prompt(0, LENGTH)
    assert asked.end is None
    assert asked.ids.shape[1] == asked.n_tokens == LENGTH


def test_a_prompt_of_only_questions_after_it_still_has_a_row(model: LoadedModel) -> None:
    recipe = dataclasses.replace(RECIPE, inside=0, end=0)
    respondent = ModelRespondent(model, Bytes((256,)), 0, "prose", recipe)
    asked = respondent.prompt(0, LENGTH)
    assert asked.rows.tolist() == [LENGTH - 1]
    assert len(respondent.answers(asked, respondent.prefill(asked, Dense()))) == 3


def test_a_prompt_beyond_the_models_context_is_refused(respondent: ModelRespondent) -> None:
    with pytest.raises(UsageError, match="made for 2048 tokens, 2049 were asked"):
        respondent.prompt(0, 2049)


def test_a_prompt_too_short_for_its_questions_is_refused(respondent: ModelRespondent) -> None:
    with pytest.raises(UsageError, match="too short for 6 questions"):
        respondent.prompt(0, 400)


def test_conflicting_statements_are_held_against_each_other() -> None:
    found = next(
        h
        for i in range(20)
        for h in [haystack(0, i, length=12000)]
        if any(f.regime == "conflicting" for f in h.facts)
    )
    encoder = Bytes((256,))
    prompt = lay_out(found, encoder.encode(found.text.decode()), encoder, torch.device("cpu"))
    facts = {f.id: f for f in found.facts}
    for ready in prompt.questions:
        fact = facts[ready.question.fact]
        rival = ready.probe.conflicting
        assert (rival is not None) == (fact.regime == "conflicting")
        if rival is not None:
            (other,) = {m.value for m in fact.mentions} - {fact.value}
            assert other.encode()[rival.at] == rival.token
            assert other.encode()[: rival.at] == fact.value.encode()[: rival.at]


def test_an_end_question_has_a_prompt_of_its_own_and_leaves_the_others_alone(
    respondent: ModelRespondent, prompt: Prompt
) -> None:
    lengths = []

    class Watching(Dense):
        def attend(self, q, k, v, *, scale, layer):
            if layer == 0:
                lengths.append(q.shape[2])
            return super().attend(q, k, v, scale=scale, layer=layer)

    without = dataclasses.replace(prompt, end=None)
    both = respondent.answers(prompt, respondent.prefill(prompt, Watching()))
    alone = respondent.answers(without, respondent.prefill(without, Dense()))
    assert lengths == [prompt.ids.shape[1], LENGTH]
    assert [*both[:2], *both[3:]] == alone


@pytest.fixture(scope="module")
def merging() -> Fast:
    """A tokenizer whose tokens are pieces of words, some with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=318, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = haystack(1, 0, length=9000).text.decode()
    tokenizer.train_from_iterator([text], trainer)
    return Fast(PreTrainedTokenizerFast(tokenizer_object=tokenizer), (319,))


def test_a_tokenizer_that_merges_bytes_is_asked_the_same(model: LoadedModel, merging: Fast) -> None:
    respondent = ModelRespondent(model, merging, 0, "prose", RECIPE)
    prompt = respondent.prompt(0, LENGTH)
    assert prompt.end is not None
    longest = prompt.ids.shape[1] + len(prompt.end.before)
    assert FILLED * LENGTH * 0.97 <= longest <= LENGTH
    ids = prompt.ids[0].tolist()
    for ready in prompt.questions:
        answer = merging.tokenizer.decode(list(ready.probe.answer))
        assert ready.question.answer in answer
        assert len(answer) <= len(ready.question.answer) + 3  # the space before, the stop behind
    at = 0
    for ready in prompt.inside:
        rows = prompt.rows[at : at + len(ready.probe.answer)]
        at += len(rows)
        assert prompt.ids[0, rows + 1].tolist() == list(ready.probe.answer)
    found = respondent.answers(prompt, respondent.prefill(prompt, Dense()))
    ready = prompt.after[0]
    tokens = [*ids, *ready.before, *ready.probe.answer[:-1]]
    (expected,) = score(whole(model, tokens)[-len(ready.probe.answer) :], [ready.probe])
    assert found[3].logprob == pytest.approx(expected.logprob, abs=1e-4)


class Curious(Dense):
    """A method that looks at what it is about to prefill."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def see(self, haystack, spans) -> None:
        mention = haystack.facts[0].mentions[0]
        self.seen.append((haystack.index, spans(mention.start, mention.end), mention.value))


def test_a_method_that_wants_to_see_is_shown_the_haystack_and_its_tokens(prompt: Prompt) -> None:
    method = Curious()
    show(method, prompt)
    show(Dense(), prompt)
    ((index, (first, last), value),) = method.seen
    assert index == 0
    assert bytes(prompt.ids[0, first:last].tolist()).decode() == value
