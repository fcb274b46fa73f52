"""Where an arm that chooses runs dense and where sparse: once per length, before any window."""

from dataclasses import asdict

from minference_green.cell import Cell
from minference_green.channel import Channel
from minference_green.methods.auto import Auto, Choice, Deciding
from minference_green.methods.law import Prediction
from minference_green.results import Decision, LayerChoice
from minference_green.task import Task


def decided(channel: Channel, task: Task, auto: Auto, cell: Cell) -> Auto:
    """``auto`` with its choices for the cell's length, which runs dense as the cell does.

    As an earlier block decided, or else from one prefill that runs sparse everywhere; that goes
    on record. Raises ``UsageError`` if no law predicts attention times on this device.
    """
    length = cell.ids.shape[1]
    for made in task.decisions:
        if (made.context_length, made.method) == (length, auto.name):
            return auto.decided(cell.dense, _choices(made))
    deciding = Deciding(auto)
    Cell(cell.model, deciding, cell.dense, cell.ids).prefill()
    record = _decision(task.block, length, deciding)
    channel.ask("record", record=record.model_dump(mode="json"))
    return auto.decided(cell.dense, deciding.choices)


def _decision(block: int, length: int, deciding: Deciding) -> Decision:
    assert deciding.law is not None  # a model that can be measured has a layer to decide for
    choices = {layer: choice for (_, layer), choice in sorted(deciding.choices.items())}
    return Decision(
        block=block,
        context_length=length,
        method=deciding.name,
        law=deciding.law.source,
        layers=tuple(
            LayerChoice(
                layer=layer,
                density=choice.density,
                **asdict(choice.prediction),
                runs="sparse" if choice.sparse else "dense",
            )
            for layer, choice in choices.items()
        ),
    )


def _choices(made: Decision) -> dict[tuple[int, int], Choice]:
    return {
        (made.context_length, one.layer): Choice(
            one.density,
            Prediction(one.dense_seconds, one.sparse_seconds, one.doubt_seconds),
        )
        for one in made.layers
    }
