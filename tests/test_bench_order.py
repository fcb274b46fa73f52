"""In which order the energy sources of a run are read."""

from types import SimpleNamespace

from minference_green.bench import _Conversation


def test_the_host_is_read_after_the_gpus_whose_edges_must_lie_near_the_work() -> None:
    """Sources are opened with the host last; a window begins and ends them in that order."""
    calls: list[str] = []

    def meter(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            begin=lambda: calls.append(f"begin {name}"),
            end=lambda start, end: calls.append(f"end {name}") or [],
            state=list,
        )

    experiment = SimpleNamespace(meters=[meter("gpu"), meter("host")])
    conversation = _Conversation(experiment, 0, None)
    conversation._begin()
    conversation._end({"start": 0.0, "end": 1.0})
    assert calls == ["begin gpu", "begin host", "end gpu", "end host"]
