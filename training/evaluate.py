"""How often a byte model answers right: ``python -m training.evaluate MODEL --output FILE``.

Loads the files as anyone would, with ``AutoModelForCausalLM``. The text of a haystack is followed
by its other questions, each with the right answer before the next is asked; an answer is right
if every byte of it is the likeliest after the bytes before it.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from minference_green.corpus.haystack import haystack
from minference_green.corpus.language import ANSWER_END
from minference_green.corpus.records import Fact, Haystack, Question

SEED = 900_001
"""Training draws from seed 1."""


def asked(stack: Haystack) -> tuple[bytes, list[tuple[Question, int]]]:
    """The text with every question in it, and where each answer begins."""
    text = bytearray(stack.text)
    starts = []
    for question in stack.questions:
        if question.answer_start is not None:
            starts.append((question, question.answer_start))
            continue
        text += question.prompt.encode()
        starts.append((question, len(text)))
        text += (question.answer + ANSWER_END).encode()
    return bytes(text), starts


def answers(model: torch.nn.Module, stack: Haystack, bos: int) -> Iterator[tuple[Question, bool]]:
    """Each question with whether its whole answer came out right."""
    text, starts = asked(stack)
    ids = torch.tensor([[bos, *text]], device=next(model.parameters()).device)
    with torch.inference_mode():
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        for question, start in starts:
            # Byte i of the text is token i + 1; the row before it predicts it.
            rows = slice(start, start + len(question.answer.encode()))
            wanted = ids[0, start + 1 : rows.stop + 1]
            yield question, bool((model.lm_head(hidden[rows]).argmax(-1) == wanted).all())


def labels(fact: Fact, question: Question) -> list[str]:
    """The groups that a question counts for; kinds and depths among plain facts only."""
    plain = fact.hops == 1 and fact.regime in ("single", "repeated")
    groups = [f"regime {fact.regime}", f"hops {fact.hops}", f"neighbour {fact.neighbour}"]
    if fact.regime == "conflicting":
        return groups
    groups += ["all", f"place {question.place}"]
    if plain:
        groups += ["plain", f"kind {fact.kind}", f"depth {min(int(fact.depth * 5), 4) / 5:.1f}"]
    return groups


def main() -> None:
    """Parse the command line, evaluate, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", default="8192:24", help="length:haystacks, comma-separated")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    found: dict[str, dict[str, list[int]]] = {}
    for part in options.lengths.split(","):
        length, stacks = map(int, part.split(":"))
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for index in range(stacks):
            filler = ("prose", "records", "code")[index % 3]
            stack = haystack(SEED, index, length=length, filler=filler)
            facts = {fact.id: fact for fact in stack.facts}
            for question, right in answers(model, stack, model.config.bos_token_id):
                for group in [*labels(facts[question.fact], question), f"filler {filler}"]:
                    counts[group][0] += right
                    counts[group][1] += 1
        found[str(length)] = {group: counts[group] for group in sorted(counts)}
        print(length, {g: f"{r}/{n}" for g, (r, n) in found[str(length)].items()}, flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
