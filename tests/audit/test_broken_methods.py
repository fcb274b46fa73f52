"""Methods broken on purpose, on a real model: the audit names what they drop, and no more."""

from types import MappingProxyType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from minference_green.api import audit
from minference_green.findings import findings

LENGTH, HAYSTACKS = 3600, 6


class Blind:
    """Dense attention that never looks at the facts it is told to drop."""

    parameters = MappingProxyType({})

    def __init__(self, name, dropped):
        self.name, self._dropped = name, dropped

    def see(self, haystack, spans):
        places = [m for f in haystack.facts if self._dropped(f) for m in f.mentions]
        tokens = {t for m in places for t in range(*spans(m.start, m.end))}
        self._hidden = torch.tensor(sorted(tokens), dtype=torch.long)

    def attend(self, q, k, v, *, scale, layer):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        seen = torch.ones(k.shape[2], dtype=torch.bool)
        seen[self._hidden] = False
        out = torch.empty_like(q)
        # Rows that are seen attend to what is seen, those that are not also to themselves.
        out[:, :, seen] = scaled_dot_product_attention(
            q[:, :, seen], k[:, :, seen], v[:, :, seen], is_causal=True, scale=scale
        )
        i, j = self._hidden[:, None], torch.arange(k.shape[2])
        mask = (j <= i) & (seen | (j == i))
        out[:, :, ~seen] = scaled_dot_product_attention(q[:, :, ~seen], k, v, mask, scale=scale)
        return out


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    methods = [
        Blind("no-paths", lambda fact: fact.kind == "path"),
        Blind("no-middle", lambda fact: 0.4 <= fact.depth < 0.6),
    ]
    return findings(
        audit(
            "embedded",
            methods=methods,
            context_lengths=[LENGTH],
            haystacks=HAYSTACKS,
            device="cpu",
            meter="none",
            output=tmp_path_factory.mktemp("audits"),
        )
    )


def test_the_embedded_model_answers_when_nothing_is_dropped(found):
    right, asked = found.dense_right(LENGTH)
    assert right > 0.9 * asked


def test_a_method_that_never_sees_one_kind_has_it_named_and_nothing_else(found):
    arm = found.arm(LENGTH, "no-paths")
    assert arm.kinds.named == ("path",)
    assert arm.depths.named == ()


def test_a_method_that_never_sees_the_middle_has_that_depth_named_and_no_kind(found):
    arm = found.arm(LENGTH, "no-middle")
    assert arm.depths.named == ("0.4-0.6",)
    assert arm.kinds.named == ()


def test_the_noise_floor_of_a_cpu_flips_nothing(found):
    floor = found.arm(LENGTH, "noise-floor")
    assert (floor.flips.lost, floor.flips.gained) == (0, 0)
