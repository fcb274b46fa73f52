"""The method ``probe`` on the trained model: answers inside the prompt survive sparse prefill."""

import pytest
import torch

from minference_green.corpus.haystack import haystack
from minference_green.methods.choose import method_from_name
from minference_green.methods.dense import Dense
from minference_green.model.attention import switched
from minference_green.model.loading import load
from training.evaluate import asked


@pytest.fixture(scope="module")
def answers():
    """Of each method, which questions inside one text of 8192 bytes it answers right."""
    model = load("embedded", device=torch.device("cpu"), dtype=torch.float32)
    stack = haystack(810_001, 0, length=8192, filler="prose")
    text, starts = asked(stack)
    ids = torch.tensor([[model.bos, *text]])
    lengths = [len(question.answer.encode()) for question, _ in starts]
    dense = Dense()

    def of(name):
        method = dense if name == "dense" else method_from_name(
            name, {}, patterns=model.patterns, probe_patterns=model.probe_patterns
        )  # fmt: skip
        with torch.inference_mode(), switched(model.model, method, dense=dense):
            hidden = model.model.model(ids, use_cache=False).last_hidden_state[0]
            best = model.model.lm_head(hidden).argmax(-1)
        return [
            bool((best[at : at + n] == ids[0, at + 1 : at + n + 1]).all())
            for (_, at), n in zip(starts, lengths, strict=True)
        ]

    return {name: of(name) for name in ("dense", "minference", "probe")}


def test_probing_keeps_answers_inside_the_prompt_that_bands_lose(answers):
    right = [i for i, known in enumerate(answers["dense"]) if known]
    assert len(right) >= 20
    kept = {name: sum(answers[name][i] for i in right) / len(right) for name in answers}
    assert kept["probe"] >= 0.9
    assert kept["minference"] <= 0.7
