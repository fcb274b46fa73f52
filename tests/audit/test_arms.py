"""From names and objects to arms: budgets, yardsticks, the noise floor."""

import pytest
import torch

from minference_green.auditing.arms import EqualDensity, arms, noise_floor, with_budgets
from minference_green.errors import UsageError
from minference_green.ledger import NOISE_FLOOR, Computed
from minference_green.methods.dense import Dense
from minference_green.methods.patterns import AShape, BlockSparse, Probed, VerticalSlash
from minference_green.methods.sparse import SparsePrefill, uniform
from minference_green.model.loading import LoadedModel


class Config:
    num_hidden_layers, num_attention_heads = 1, 2

    def get_text_config(self):
        return self


class Network:
    config = Config()


MODEL = LoadedModel(
    model=Network(), spec="tiny", revision="1", weights="trained", parameters=1,
    max_context=None, vocabulary=320, bos=256,
    patterns=((AShape(8, 64), VerticalSlash(10, 20)),), allow_longer=False, directory=None,
)  # fmt: skip


def made(*asked, budgets=(), options=None, own=None):
    return arms(("dense", *asked), options or {}, MODEL, budgets=budgets, seed=7, own=own or {})


def test_dense_comes_first_and_the_noise_floor_last():
    found = made("a-shape", "minference")
    assert list(found) == ["dense", "a-shape", "minference", NOISE_FLOOR]
    assert isinstance(found["dense"], Dense)


def test_the_noise_floor_leaves_nothing_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 111, 16), torch.randn(1, 1, 111, 16), torch.randn(1, 1, 111, 16)
    account = noise_floor().profile(q, k, v, scale=0.25, layer=0)
    assert account.density.tolist() == [1.0, 1.0]
    torch.testing.assert_close(account.out, Dense().attend(q, k, v, scale=0.25, layer=0))


def test_budgets_scale_what_each_pattern_spends_and_keep_the_rest():
    patterns = ((VerticalSlash(10, 20), AShape(8, 64)), (BlockSparse(3), Probed(2, 8)))
    method = SparsePrefill("mine", patterns, {"patterns": "given"})
    found = with_budgets({"dense": Dense(), "mine": method}, (0.25, 2.0))
    assert list(found) == ["dense", "mine x0.25", "mine", "mine x2"]
    assert found["mine"] is method
    assert found["mine x2"].patterns == (
        (VerticalSlash(20, 40), AShape(8, 128)),
        (BlockSparse(6), Probed(4, 8)),
    )
    assert found["mine x0.25"].patterns[1] == (BlockSparse(1), Probed(1, 8))
    assert found["mine x2"].parameters == {"patterns": "given", "budgets": "times 2"}


def test_without_budgets_methods_are_as_they_are():
    method = uniform("a-shape", AShape(8, 64))
    assert with_budgets({"a-shape": method}, ()) == {"a-shape": method}


def test_a_yardstick_takes_the_densities_of_the_first_sparse_method():
    oracle = made("oracle", "minference", "a-shape")["oracle"]
    assert isinstance(oracle, EqualDensity)
    assert oracle.of == "minference"
    assert "that of minference" in oracle.parameters["density"]
    told = Computed(
        context_length=1, method="minference", density=0.2, density_by_layer=((0.1, 0.3),)
    )
    assert oracle.at({"minference": told}).density == ((0.1, 0.3),)


def test_a_random_index_is_drawn_from_the_audits_seed_or_its_own():
    assert made("minference", "random")["random"].seed == 7
    options = {"random": {"seed": "3"}}
    assert made("minference", "random", options=options)["random"].seed == 3


def test_a_yardstick_with_a_density_of_its_own_needs_no_other_method():
    found = made("oracle", options={"oracle": {"density": "0.25"}})
    assert found["oracle"].density == 0.25


def test_a_method_given_as_an_object_is_that_object():
    class Mine(Dense):
        name = "mine"

    method = Mine()
    found = made("mine", "a-shape", own={"mine": method})
    assert found["mine"] is method
    assert next(iter(found)) == "dense"


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        (("oracle",), {}, "takes its density from a sparse method, and none is audited"),
        (("minferense",), {}, "'minferense' is not a method; choose from dense"),
        (("a-shape", "oracle"), {"oracle": {"tiles": "3"}}, "oracle has no option 'tiles'"),
        (("a-shape", "oracle"), {"oracle": {"seed": "3"}}, "oracle has no option 'seed'"),
        (("a-shape", "random"), {"random": {"seed": "x"}}, "seed must be a whole number, got 'x'"),
        (("a-shape",), {"spread": {"rows": "3"}}, "is given for spread"),
    ],
)
def test_arms_that_cannot_be_are_refused(asked, options, message):
    with pytest.raises(UsageError, match=message):
        made(*asked, options=options)


def test_a_method_that_tells_no_density_gives_none_to_a_yardstick():
    oracle = made("minference", "oracle")["oracle"]
    silent = Computed(context_length=1, method="minference", density=None)
    with pytest.raises(UsageError, match=r"--method-option oracle\.density=0\.1"):
        oracle.at({"minference": silent})
