"""A verdict in words: which arm moved, what changed, what to do next."""

import math

import pytest

from minference_green.render.verdict import lines
from minference_green.verdict import compare

WOBBLE = (0.004, -0.006, 0.002, 0.005, -0.003, -0.002)


@pytest.fixture
def run_of(make_run):
    def build(ratio, reference=100.0, blocks=6, spread=1.0, common=0.0, **more):
        wobble = WOBBLE[:blocks]
        return make_run(
            {
                (8192, "dense"): [[reference * math.exp(common * w)] for w in wobble],
                (8192, "minference"): [
                    [reference * ratio * math.exp((common + spread) * w)] for w in wobble
                ],
            },
            density={(8192, "minference"): 0.2},
            **more,
        )

    return build


def test_a_regression_names_the_change_the_density_and_the_arm_that_moved(run_of):
    text = lines(compare(run_of(0.6), run_of(0.66, fingerprint={"kernel_hash": "bbbb"})))
    assert text[0] == "FAIL at a margin of 5.0%: 6 blocks against 1 stored run"
    assert text[1] == (
        "8k minference, joules per token against dense: changed by 10.0 % [9.5, 10.5], "
        "density 0.20 -> 0.20: FAIL, worse by more than the margin "
        "(minference +10.0 %, dense +0.0 %)"
    )
    assert "(fail, not judged)" in text[2]
    assert text[3] == "Changed: kernels: aaaa -> bbbb"
    assert len(text) == 4


@pytest.mark.parametrize(
    ("ratio", "reference", "words"),
    [
        (0.6, 112.0, "both-moved: both arms left the margin (minference +12.0 %, dense +12.0 %)"),
        (0.6667, 90.0, "reference-moved: dense got cheaper (minference +0.0 %, dense -10.0 %)"),
        (0.63, 100.0, "the margin lies inside the deciding interval"),
    ],
)
def test_an_open_verdict_says_why(run_of, ratio, reference, words):
    text = lines(compare(run_of(0.6), run_of(ratio, reference)))
    assert text[0].startswith("INCONCLUSIVE")
    assert words in text[1]
    assert "Next look at 10 blocks: go on with the same run (--resume)." in text


def test_noise_that_hides_whether_the_machine_changed_is_the_reason(run_of):
    text = lines(compare(run_of(0.6, common=12), run_of(0.6, common=12)))
    assert text[0].startswith("INCONCLUSIVE")
    assert (
        "neither-held: neither arm is shown to be within 7.5% of where it stood (minference +0.0 %"
        in text[1]
    )
    assert any("hides whether the machine changed: calm it, or measure more" in t for t in text)
    assert "Next look at 10 blocks: go on with the same run (--resume)." in text


def test_few_blocks_are_the_reason_and_not_a_figure(run_of):
    text = lines(compare(run_of(0.6), run_of(0.6, blocks=2)))
    assert "changed by n/a" in text[1]
    assert "2 block(s) with both arms; a verdict takes 4 on each side" in text[1]


def test_the_blocks_that_would_decide_are_told(run_of):
    text = lines(compare(run_of(0.6), run_of(0.6 * 1.02, spread=6)))
    assert any("blocks would decide with 90 % power" in line for line in text)
    at_the_margin = lines(compare(run_of(0.6), run_of(0.6 * 1.05)))
    assert any("no number of blocks would decide" in line for line in at_the_margin)


def test_an_improvement_and_an_allowed_mismatch_stand_in_the_verdict(run_of):
    verdict = compare(
        run_of(0.6), run_of(0.5, fingerprint={"dtype": "float16"}), allow_mismatch=["dtype"]
    )
    text = lines(verdict)
    assert text[0].startswith("IMPROVED")
    assert "! The runs differ in dtype, which was allowed; their joules are not comparable." in text
    assert "Changed: dtype: bfloat16 -> float16" in text
