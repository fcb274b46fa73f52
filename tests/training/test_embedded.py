"""Training: a stock Llama's arithmetic, resumable to the bit, and something is learned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from training.documents import SOME_NAMES
from training.embedded import (
    LEARN,
    LENGTHEN,
    STEP_TOKENS,
    Pass,
    Steps,
    Trainer,
    export,
    main,
    plan,
    run,
    saved,
)
from training.network import Network, Shape
from training.positions import LONGEST, jumping_positions

CPU = torch.device("cpu")
SMALL = Shape(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def trainer(steps: int = 6) -> Trainer:
    stages = ((64, 256 * steps), (128, 256 * 2))
    once = Pass(stages, rate=1.0, decline=0.3, last=0.05, names=SOME_NAMES, far=0.0, softest=0.8)
    return Trainer(plan((once,), 256), SMALL, CPU, seed=1)


def advance(one: Trainer, steps: int) -> list[float]:
    documents = Steps(one.plan, one.step, one.seed)
    return [float(one.train(*documents[i])[0]) for i in range(steps)]


def test_the_network_is_transformers_llama_to_the_bit(tmp_path):
    network = Network(SMALL)
    network.initialise(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor in network.parameters():  # what begins at zero would hide a mistake
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
            tensor.copy_(tensor.to(torch.bfloat16))
    export(network, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(stock) is LlamaForCausalLM
    ids = torch.randint(0, 320, (2, 111), generator=generator)
    positions = torch.arange(111).expand(2, -1)
    with torch.no_grad():
        wanted = stock.model(ids).last_hidden_state
        found = network.hidden(ids, positions)
        normed = torch.nn.functional.rms_norm(found, (32,), network.model.norm.weight, 1e-5)
        losses, right = network.losses(found, ids.reshape(-1))
        logits = stock(ids).logits.reshape(-1, 320)
    torch.testing.assert_close(normed.view(wanted.shape), wanted, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits, ids.reshape(-1), reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(right, logits.argmax(-1) == ids.reshape(-1))


def test_a_training_cut_in_two_ends_with_the_same_bits(tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    advance(whole, 8)
    advance(first, 5)
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    assert second.step == 5
    advance(second, 3)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[name]), name


@pytest.mark.parametrize("call", [1, 2])
def test_a_save_cut_at_any_rename_leaves_a_whole_one(tmp_path, monkeypatch, call):
    folder, one = tmp_path / "checkpoint", trainer()
    one.save(folder)
    advance(one, 1)
    renames = []

    def cut(self, target, rename=Path.rename):
        renames.append(target)
        if len(renames) == call:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            one.save(folder)
    assert saved(folder)
    two = trainer()
    two.load(folder)
    assert two.step == call - 1  # the new one was whole, only its name was not
    two.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_first_save_cut_before_its_end_is_none(tmp_path):
    (tmp_path / "checkpoint.new").mkdir()
    (tmp_path / "checkpoint.new/weights.safetensors").write_bytes(b"half")
    assert not saved(tmp_path / "checkpoint")


def test_what_was_never_trained_is_not_exported(tmp_path, monkeypatch, capsys):
    words = ["embedded", "--work", str(tmp_path), "--export", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    with pytest.raises(SystemExit):
        main()
    assert "train first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_something_is_learned():
    losses = advance(trainer(40), 40)
    assert losses[-1] < 0.8 * losses[0]


def test_a_piece_logs_stops_and_saves(tmp_path):
    one = trainer()
    run(one, tmp_path, seconds=0.0, workers=0)
    assert one.step == 1
    run(one, tmp_path, seconds=1e9, workers=0, every=2)
    assert one.step == len(one.plan) == 8
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 6, 8]
    assert json.loads((tmp_path / "checkpoint/step.json").read_text()) == {"step": 8, "seed": 1}


def test_the_rate_rises_stays_and_declines_and_rises_a_quarter_as_high_again():
    steps = plan((LEARN, LENGTHEN), STEP_TOKENS)
    learn = len(plan((LEARN,), STEP_TOKENS))
    rates = [step.rate for step in steps]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100] == rates[learn // 2] == 1.0
    assert rates[learn - 1] == pytest.approx(0.05, abs=0.001)
    assert 0.15 < max(rates[learn:]) <= 0.25
    assert rates[-1] == pytest.approx(0.0125, abs=0.001)
    lengths = [step.length for step in steps]
    assert [lengths[0], lengths[learn - 1], lengths[-1]] == [512, 131_072, 131_072]
    assert {step.rows * step.length for step in steps} == {STEP_TOKENS}


@pytest.mark.parametrize("length", [64, 512, 131_072])
def test_positions_rise_and_some_leap_far(length):
    positions = jumping_positions(64, length, torch.Generator().manual_seed(0))
    steps = positions.diff(dim=1)
    assert (positions[:, 0] == 0).all()
    assert steps.min() == 1
    assert positions.max() < LONGEST
    plain = (steps == 1).all(1).float().mean()
    assert 0.1 < plain < 0.5
    assert positions.max() > 0.3 * LONGEST
    assert (steps > 1).sum(1).max() <= 15


def test_more_positions_are_far_where_the_leaps_are_uniform():
    ends = [
        jumping_positions(2000, 64, torch.Generator().manual_seed(0), far)[:, -1] for far in (0, 1)
    ]
    log_uniform, uniform = ((end > LONGEST / 2).float().mean() for end in ends)
    assert log_uniform < 0.06
    assert 0.33 < uniform < 0.42  # half of the three rows in four that leap
