"""What is observed of an arm, against brute force, and that no window pays for it."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from minference_green import worker
from minference_green.cell import Cell
from minference_green.kernels.reference import attention, causal_mask
from minference_green.methods.dense import Dense, DenseAgain
from minference_green.methods.method import LayerProfile, PrefillMethod
from minference_green.methods.patterns import AShape, VerticalSlash
from minference_green.methods.sparse import SparsePrefill, uniform
from minference_green.model.attention import switched
from minference_green.model.hidden import tapped
from minference_green.model.loading import LoadedModel, load
from minference_green.observe import NO_RECALL, observe
from minference_green.results import Faithfulness, Note, Observation
from minference_green.task import Task
from minference_green.workload import Workload

LENGTH = 333  # awkward: 5 tiles and 13 rows, more than the 256 rows sampled
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ],
)
MIXED = (VerticalSlash(30, 100), AShape(4, 70))


@dataclass
class Parent:
    """The other side of the channel; notes what it is told."""

    records: list[dict[str, Any]] = field(default_factory=list)
    hear: Callable[[str, dict[str, Any]], None] = lambda _type, _fields: None

    def ask(self, type_: str, **fields: Any) -> dict[str, Any]:
        self.hear(type_, fields)
        if type_ == "record":
            self.records.append(fields["record"])
        return {"celsius": None} if type_ == "temperature" else {}

    @property
    def observations(self) -> dict[str, Observation]:
        found = [r for r in self.records if r["event"] == "observation"]
        return {r["method"]: Observation.model_validate(r) for r in found}

    @property
    def notes(self) -> list[str]:
        return [Note.model_validate(r).message for r in self.records if r["event"] == "note"]


@dataclass(frozen=True)
class Local:
    """A user's method with nothing but ``attend``: the last 40 keys, or what it does instead."""

    name: str = "local"
    answer: Callable[[Tensor], Tensor] = lambda out: out
    parameters = property(lambda self: {})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        n = q.shape[2]
        mask = causal_mask(n, n) & ~causal_mask(n, n).tril(-40)
        mask = mask.expand(*q.shape[:2], -1, -1).to(q.device)
        return self.answer(attention(q, k, v, mask, scale=scale)[0].to(q.dtype))


@dataclass(frozen=True)
class Changed:
    """A method whose profile is changed on its way."""

    method: SparsePrefill
    change: Callable[[LayerProfile], LayerProfile]
    name: str = "changed"
    parameters = property(lambda self: {})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
        return self.method.attend(q, k, v, scale=scale, layer=layer)

    def profile(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> LayerProfile:
        return self.change(self.method.profile(q, k, v, scale=scale, layer=layer))


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load("planted:tiny", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def task() -> Task:
    workload = Workload(model="planted:tiny", context_lengths=(LENGTH,), batch=2, dtype="float32")
    return Task(
        block=0,
        workload=workload,
        methods=("dense", "vertical-slash"),
        options={"vertical-slash": {"vertical_size": "30", "slash_size": "100"}},
        allow_longer=False,
        rest="stock",
        window_seconds=0.01,
        warmup_seconds=0.0,
        decode_tokens=0,
        breakdown=False,
        idle_seconds=0.0,
        backends={},
        decisions=(),
        observed=(),
        excluded=(),
    )


@pytest.fixture
def look(tiny: LoadedModel, task: Task) -> Callable[..., Parent]:
    """Observe methods, the first of them the reference unless another is named."""

    def call(
        *methods: PrefillMethod,
        model: LoadedModel = tiny,
        length: int = LENGTH,
        reference: str | None = None,
        **fields: Any,
    ) -> Parent:
        ids = model.prompt(task.workload, length)
        arms = {m.name: Cell(model, m, Dense(), ids) for m in methods}
        parent = Parent()
        observe(parent, replace(task, **fields), length, arms, reference or methods[0].name)
        return parent

    return call


def mixed(n_layers: int = 3, n_heads: int = 8) -> SparsePrefill:
    return SparsePrefill("mixed", ((MIXED * (n_heads // 2),) * n_layers), {})


def lost(parent: Parent, name: str) -> Faithfulness:
    found = parent.observations[name].faithfulness
    assert found is not None
    return found


def test_dense_beside_dense_loses_nothing(look: Callable[..., Parent]) -> None:
    parent = look(Dense(), DenseAgain())
    assert parent.observations["dense"].faithfulness is None
    found = lost(parent, "dense-again")
    assert found.prompt.kl_nats == 0
    assert found.prompt.nll_change_nats == 0
    assert found.prompt.top1_agreement == 1
    assert found.recall == found.recall_in_situ
    assert found.recall is not None
    assert found.recall.worst_head == 1
    assert found.whole_rows == LENGTH
    assert found.beyond_whole_rows is None
    assert found.output_error == (0, 0, 0)
    assert found.residual_cosine == pytest.approx((1, 1, 1), abs=1e-6)


def test_an_arm_is_known_by_the_whole_distributions_of_both(
    look: Callable[..., Parent], tiny: LoadedModel, task: Task
) -> None:
    """At 333 tokens every position is sampled, so every figure has a closed form."""
    method = mixed()
    parent = look(Dense(), method)
    found, observation = lost(parent, "mixed"), parent.observations["mixed"]
    ids = tiny.prompt(task.workload, LENGTH)
    with torch.inference_mode():
        logp = []
        for arm in (Dense(), method):
            with switched(tiny.model, arm, dense=Dense()):
                logp.append(tiny.model(input_ids=ids).logits.double().log_softmax(-1))
    p, q = logp
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.prompt.positions == 2 * LENGTH
    assert found.prompt.kl_nats == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.prompt.kl_nats > 1e-4
    assert found.last_rows.kl_nats == pytest.approx(kl[:, -64:].mean().item(), rel=1e-3)
    change = (p - q)[:, :-1].gather(2, ids[:, 1:, None]).mean().item()
    assert found.prompt.nll_change_nats == pytest.approx(change, rel=1e-2, abs=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.prompt.top1_agreement == same == observation.top1_agreement
    decile = torch.arange(LENGTH) * 10 // LENGTH
    for d in (0, 9):
        want = kl[:, decile == d].mean().item()
        assert found.kl_nats_by_decile[d] == pytest.approx(want, rel=1e-3, abs=1e-6)
    whole = found.whole_rows
    assert whole is not None
    assert 0 < whole < LENGTH
    assert found.beyond_whole_rows is not None
    assert found.beyond_whole_rows.kl_nats == pytest.approx(kl[:, whole:].mean().item(), rel=1e-3)
    assert kl[:, :whole].max() < 1e-4  # nothing was lost there


def test_recall_is_the_mass_of_the_pairs_kept_on_the_inputs_of_the_dense_run(
    look: Callable[..., Parent], tiny: LoadedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minference_green.observe.ROWS", LENGTH)
    method = mixed()
    found = lost(look(Dense(), method), "mixed")
    assert found.rows == 2 * LENGTH
    assert found.recall is not None
    assert found.recall_in_situ is not None
    inputs: dict[str, dict[int, tuple[Tensor, ...]]] = {"dense": {}, "mixed": {}}

    class Noting(Local):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, layer: int) -> Tensor:
            inputs[self.name][layer] = (q, k, v, torch.tensor(scale))
            arm = Dense() if self.name == "dense" else method
            return arm.attend(q, k, v, scale=scale, layer=layer)

    for name in inputs:
        Cell(tiny, Noting(name), Dense(), tiny.prompt(task.workload, LENGTH)).prefill()
    decile = torch.arange(LENGTH) * 10 // LENGTH
    for name, recall in (("dense", found.recall), ("mixed", found.recall_in_situ)):
        for layer, (q, k, v, scale) in inputs[name].items():
            seen = torch.zeros(2, 8, LENGTH, LENGTH, dtype=torch.bool)
            for index in method.profile(q, k, v, scale=float(scale), layer=layer).indices:
                seen[:, index.heads.long()] = index.mask(LENGTH, LENGTH)
            everything = causal_mask(LENGTH, LENGTH).expand_as(seen)
            out, dense_lse = attention(q, k, v, everything, scale=float(scale))
            kept_out, kept_lse = attention(q, k, v, seen, scale=float(scale))
            kept = (kept_lse - dense_lse).exp()
            assert recall.by_head[layer] == pytest.approx(kept.mean((0, 2)).tolist(), rel=1e-4)
            want = [kept[:, :, decile == d].mean().item() for d in range(10)]
            assert recall.by_decile[layer] == pytest.approx(want, rel=1e-4)
            if name == "dense":
                error = ((kept_out - out).norm() / out.norm()).item()
                assert found.output_error[layer] == pytest.approx(error, rel=1e-3)
    assert found.recall.worst_head < 0.95
    # The first layer's inputs are the same in both runs, the last one's are not.
    assert found.recall.by_head[0] == pytest.approx(found.recall_in_situ.by_head[0], rel=1e-4)
    assert found.recall.by_head[2] != found.recall_in_situ.by_head[2]


def test_a_method_that_only_attends_is_compared_and_its_recall_is_not_known(
    look: Callable[..., Parent],
) -> None:
    found = lost(look(Dense(), Local()), "local")
    assert found.prompt.kl_nats > 0
    assert found.prompt.top1_agreement < 1
    assert min(found.output_error) > 0
    assert found.residual_cosine[2] < 1
    assert (found.recall, found.recall_in_situ, found.recall_reason) == (None, None, NO_RECALL)
    assert found.whole_rows is None


def test_a_key_counted_twice_is_told_and_its_recall_left_out(look: Callable[..., Parent]) -> None:
    def twice(profile: LayerProfile) -> LayerProfile:
        assert profile.lse is not None
        return replace(profile, lse=profile.lse + 0.01)

    parent = look(Dense(), Changed(mixed(), twice))
    found, observation = lost(parent, "changed"), parent.observations["changed"]
    assert found.recall is None
    assert found.recall_in_situ is None
    assert "kept 1.01 of its attention" in str(found.recall_reason)
    assert any(
        note.startswith("changed at 333, layer 0: a row kept 1.01") for note in observation.notes
    )


def test_an_output_that_is_not_finite_is_told_instead_of_compared(
    look: Callable[..., Parent],
) -> None:
    def spoiled(out: Tensor) -> Tensor:
        return out.index_fill(2, torch.tensor([7]), torch.nan)

    observation = look(Dense(), Local(answer=spoiled)).observations["local"]
    assert observation.faithfulness is None
    assert "is not finite at" in str(observation.faithfulness_reason)
    # A NaN in the reference is not laid at the door of what is held against it, nor of the head.
    other = look(Local(answer=spoiled), Dense(), reference="local").observations["dense"]
    assert other.faithfulness is None
    assert str(other.faithfulness_reason).startswith("the reference arm's output is not finite at")
    assert observation.top1_agreement is None


def test_an_arm_out_of_memory_is_noted_and_the_others_are_observed(
    look: Callable[..., Parent],
) -> None:
    def greedy(out: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 99 GiB\nand more")

    parent = look(Dense(), Local(answer=greedy), mixed())
    assert parent.observations.keys() == {"dense", "mixed"}
    assert parent.notes == ["local at 333 not observed: Tried to allocate 99 GiB"]


def test_an_arm_that_fits_alone_but_not_beside_the_reference_says_so(
    look: Callable[..., Parent],
) -> None:
    calls = Counter[str]()

    def greedy_at_first(out: Tensor) -> Tensor:
        calls["local"] += 1
        if calls["local"] == 1:
            raise torch.OutOfMemoryError("Tried to allocate 99 GiB")
        return out

    observation = look(Dense(), Local(answer=greedy_at_first)).observations["local"]
    assert observation.logits_relative_error is not None
    assert observation.faithfulness_reason == (
        "out of memory beside the reference arm: Tried to allocate 99 GiB"
    )


def test_without_its_reference_an_arm_is_not_compared_with_another(
    look: Callable[..., Parent],
) -> None:
    parent = look(mixed(), Local(), reference="dense")
    for observation in parent.observations.values():
        assert observation.logits_relative_error is None
        assert observation.faithfulness_reason == "the reference arm dense was not observed"
    assert len(parent.observations) == 2


def test_what_is_on_file_is_not_observed_again(look: Callable[..., Parent]) -> None:
    on_file = ((LENGTH, "dense"), (LENGTH, "mixed"))
    assert look(Dense(), mixed(), observed=on_file).records == []
    parent = look(Dense(), mixed(), Local(), observed=on_file)
    assert parent.observations.keys() == {"local"}
    assert parent.observations["local"].faithfulness is not None


@pytest.mark.parametrize("length", [2, 7, 65])
def test_a_prompt_shorter_than_the_samples_is_observed_whole(
    look: Callable[..., Parent], length: int
) -> None:
    found = lost(look(Dense(), mixed(), length=length), "mixed")
    assert found.prompt.positions == 2 * length
    assert found.rows == 2 * length
    assert found.last_rows.positions == 2 * min(length, 64)
    assert len([d for d in found.kl_nats_by_decile if d is not None]) == min(length, 10)
    assert found.prompt.kl_nats < 1e-4  # all keys are within the budgets


def test_a_model_that_changes_its_logits_after_its_head_is_not_compared(
    look: Callable[..., Parent], tiny: LoadedModel
) -> None:
    from transformers import AutoModelForCausalLM, GraniteConfig

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = GraniteConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, logits_scaling=3.0,
        bos_token_id=1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    granite = replace(tiny, model=model, vocabulary=97, bos=1, patterns=None)
    observation = look(Dense(), mixed(2, 4), model=granite).observations["mixed"]
    assert observation.logits_relative_error is not None
    assert "changes its logits after its head" in str(observation.faithfulness_reason)


def hooks() -> list[nn.Module]:
    modules = (m for m in gc.get_objects() if issubclass(type(m), nn.Module))
    return [m for m in modules if m._forward_hooks]


def test_taps_end_with_the_block_whatever_happens(tiny: LoadedModel) -> None:
    unused = {"layer": lambda _n, _h: None, "last": lambda _h: None}
    with pytest.raises(ArithmeticError), tapped(tiny.model, **unused):
        assert len(hooks()) == 4  # three layers and the model
        raise ArithmeticError
    assert hooks() == []


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often anything that only observation does was called."""
    calls = Counter[str]()

    def counting(where: Any, name: str) -> None:
        original = getattr(where, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, call)

    counting(SparsePrefill, "profile")
    counting(Dense, "profile")
    for name in ("causal_lse", "divergences", "tapped"):
        counting(__import__("minference_green.observe", fromlist=[name]), name)
    yield calls


def test_no_window_runs_what_observes(task: Task, counted: Counter[str]) -> None:
    """From the word that a window may begin to its end nothing of an observation is called."""
    within = False
    at_start = Counter[str]()
    windows = Counter[str]()

    def hear(type_: str, fields: dict[str, Any]) -> None:
        nonlocal within, at_start
        if type_ == "ready":
            assert hooks() == []
            within, at_start = True, Counter(counted)
        elif within:
            assert counted == at_start, type_
            within = False
            windows[type_] += 1

    parent = Parent(hear=hear)
    worker.serve(parent, replace(task, decode_tokens=3), torch.device("cpu"))
    assert windows == {"idle": 2, "window": 12}
    assert parent.observations["vertical-slash"].faithfulness is not None
    assert counted["profile"] >= 9  # dense, taught and own, three layers each
    assert counted.keys() == {"profile", "causal_lse", "divergences", "tapped"}


class Operations(TorchDispatchMode):
    """The operations that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_prefill_is_the_same_operations_before_and_after_it_was_observed(
    tiny: LoadedModel, task: Task
) -> None:
    ids = tiny.prompt(task.workload, LENGTH)
    arms = {m.name: Cell(tiny, m, Dense(), ids) for m in (Dense(), uniform("a-shape", AShape(4)))}

    def operations() -> list[str]:
        with Operations() as seen:
            for cell in arms.values():
                cell.prefill()
        return seen.names

    before = operations()
    observe(Parent(), task, LENGTH, arms, "dense")
    assert operations() == before
    assert len(before) > 100


@pytest.mark.parametrize("device", [CUDA])
def test_a_window_on_a_gpu_launches_the_same_kernels_and_what_they_kept_adds_up(
    task: Task, device: str
) -> None:
    n = 3001
    model = load("planted:tiny", device=torch.device(device), dtype=torch.bfloat16)
    assert model.patterns is not None
    sparse = SparsePrefill("minference", model.patterns, {})
    ids = model.prompt(replace(task.workload, context_lengths=(n,)), n)
    arms = {m.name: Cell(model, m, Dense(), ids) for m in (Dense(), sparse)}

    def launched() -> Counter[str]:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for cell in arms.values():
                cell.repeat(2)
        # Kernels alone: after an observation the allocator asks the driver for memory again.
        return Counter(e.name for e in seen.events() if e.device_type == DeviceType.CUDA)

    for cell in arms.values():
        cell.repeat(1)
    launched()  # the profiler's first use
    before = launched()
    parent = Parent()
    observe(parent, task, n, arms, "dense")
    assert launched() == before
    assert sum(before.values()) > 20
    observation, found = parent.observations["minference"], lost(parent, "minference")
    assert observation.density is not None
    assert observation.density < 0.6
    assert found.recall is not None
    assert found.recall_in_situ is not None
    assert 0.3 < found.recall.worst_head < found.recall.mean <= 1.001
    assert found.whole_rows is not None
    assert 64 <= found.whole_rows < n
    assert found.prompt.kl_nats > 0
