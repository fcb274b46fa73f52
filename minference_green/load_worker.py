"""The process behind ``load.WorkerLoad``: matrix products on one device, as told."""

import math
import sys
import time
from collections import deque
from typing import Any

import torch

from minference_green.channel import Channel, Message, die_with_parent
from minference_green.methods.backend import synchronize

_SLICE_SECONDS = 0.02
"""Work put on the device at a time: commands are answered at least this often."""

_SPIN_SECONDS = 0.002
"""The last of a wait is spun through: a sleep may return late."""


class _Products:
    """Matrix products on one device."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        n, dtype = (8192, torch.bfloat16) if cuda else (256, torch.float32)
        self.device = device
        self._a, self._b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._flight: deque[torch.cuda.Event] = deque()
        self.run(50)  # brings the clocks up
        began = time.monotonic()
        self.run(50)
        self.seconds = (time.monotonic() - began) / 50

    def launch(self, times: int) -> None:
        """Put products on the device without waiting for them."""
        for _ in range(times):
            torch.mm(self._a, self._b, out=self._out)

    def run(self, times: int) -> None:
        """Products, done when it returns."""
        self.launch(times)
        synchronize(self.device)

    def keep_busy(self) -> None:
        """One more slice; returns while the one before is still running, so no gap comes."""
        self.launch(self.count(_SLICE_SECONDS))
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._flight.append(event)
            if len(self._flight) > 2:
                self._flight.popleft().synchronize()

    def count(self, seconds: float) -> int:
        """Products that take about so long; the same for the same seconds."""
        return max(1, round(seconds / self.seconds))


def main(read_fd: int, write_fd: int) -> int:
    """Obey the channel until it closes."""
    die_with_parent()
    with torch.inference_mode(), Channel(read_fd, write_fd) as channel:
        first = channel.receive()
        if first is None:
            return 1
        try:
            products = _Products(_device(first["name"]))
        except (RuntimeError, LookupError) as error:
            channel.send("error", message=str(error).splitlines()[0])
            return 0
        channel.send("ready")
        try:
            _serve(channel, products)
        except BrokenPipeError:
            return 1
    return 0


def _device(name: str) -> torch.device:
    """The torch device of a GPU's UUID, or the CPU."""
    if name == "cpu":
        return torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        if f"GPU-{torch.cuda.get_device_properties(index).uuid}" == name:
            return torch.device("cuda", index)
    raise LookupError(
        f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs and not {name}; "
        "install a CUDA build of torch, or set CUDA_VISIBLE_DEVICES to that GPU"
    )


def _serve(channel: Channel, products: _Products) -> None:
    command: Message = {"type": "idle"}
    while True:
        if command["type"] == "idle" or channel.waiting():
            received = channel.receive()
            if received is None:
                return
            command = received
            channel.send("done", **_begin(command, products))
        elif command["type"] == "steady":
            products.keep_busy()
        else:
            _pulse(command, products)
        if command["type"] == "work":
            command = {"type": "idle"}


def _begin(command: Message, products: _Products) -> dict[str, Any]:
    synchronize(products.device)
    now = time.monotonic()
    match command["type"]:
        case "steady":
            products.keep_busy()
        case "work":
            products.run(products.count(command["seconds"]))
            return {"start": now, "end": time.monotonic()}
    return {"seconds": now}


def _pulse(command: Message, products: _Products) -> None:
    """Wait for the next period to begin, then be busy for its first part."""
    period, origin = command["period_seconds"], command["origin"]
    begin = origin + math.ceil((time.monotonic() - origin) / period) * period
    time.sleep(max(0.0, begin - time.monotonic() - _SPIN_SECONDS))
    while time.monotonic() < begin:
        pass
    products.run(products.count(command["on_seconds"]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
