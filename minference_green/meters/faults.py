"""What can be wrong with an energy source. Each is its own type, with its own advice."""

from minference_green.errors import MeasurementError, UsageError

_WAY_ON = "or go on without joules: --no-energy"


class NvmlMissingError(MeasurementError):
    """The NVML library is not on this machine."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"the NVIDIA management library (libnvidia-ml.so.1) cannot be loaded: {detail}; "
            "install the NVIDIA driver, in a container start it with the NVIDIA runtime and "
            f"the `utility` capability, {_WAY_ON}"
        )


class DriverError(MeasurementError):
    """NVML is there but the driver behind it does not answer."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"the NVIDIA driver does not answer: {detail}; load it (nvidia-smi must work), "
            f"reboot after a driver update, {_WAY_ON}"
        )


class NoGpuError(MeasurementError):
    """No GPU to read, or not the one asked for."""

    def __init__(self, wanted: str, present: list[str]) -> None:
        super().__init__(
            f"NVML shows no GPU {wanted}; it shows {', '.join(present) or 'none'}. "
            f"Check CUDA_VISIBLE_DEVICES and nvidia-smi -L, {_WAY_ON}"
        )


class NotPermittedError(MeasurementError):
    """The operating system or the driver refuses the reading."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what} is not permitted for this user; {advice}, {_WAY_ON}")


class NoCounterError(MeasurementError):
    """A GPU has no energy counter (older than Volta, or a virtual GPU)."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"GPU {device} has no energy counter; its sampled power can stand in, {_WAY_ON}"
        )


class NoPowerError(MeasurementError):
    """A GPU shows neither an energy counter nor its power."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"GPU {device} shows neither an energy counter nor its power (a virtual GPU?); "
            f"measure on the bare device, {_WAY_ON}"
        )


class DeviceLostError(MeasurementError):
    """The GPU stopped answering."""

    def __init__(self, device: str, detail: str) -> None:
        super().__init__(
            f"GPU {device} stopped answering: {detail}; see dmesg for an Xid, "
            "reset or reboot, then resume the run"
        )


class NvmlCallError(MeasurementError):
    """NVML refused a call for a reason without a type of its own."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(f"NVML could not read {what}: {detail}; try nvidia-smi -q, {_WAY_ON}")


class WrongDeviceError(MeasurementError):
    """The handle for one UUID answers with another."""

    def __init__(self, wanted: str, found: str) -> None:
        super().__init__(
            f"asked for GPU {wanted}, the device answers as {found}; "
            "it was renumbered or replaced: start the run again"
        )


class MigError(MeasurementError):
    """The counter covers the board, the work only a slice of it."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"GPU {device} is cut into MIG slices and its counter covers the whole board; "
            "turn MIG off, or accept the board's energy with --allow-shared"
        )


class SharedDeviceError(MeasurementError):
    """Somebody else computes on the GPU."""

    def __init__(self, device: str, processes: str) -> None:
        super().__init__(
            f"GPU {device} is shared with {processes}; its joules would be theirs too. "
            "Wait, choose another GPU with CUDA_VISIBLE_DEVICES, or accept it with --allow-shared"
        )


class DeviceInUseError(MeasurementError):
    """Another measurement holds the GPU's lock."""

    def __init__(self, device: str, lock: str) -> None:
        super().__init__(
            f"GPU {device} is being measured by another run (lock {lock}); "
            "wait for it, or choose another GPU with CUDA_VISIBLE_DEVICES"
        )


class CounterBackwardsError(MeasurementError):
    """An energy counter went down."""

    def __init__(self, device: str, before: float, after: float) -> None:
        super().__init__(
            f"the energy counter of {device} went backwards, from {before:.3f} J to {after:.3f} J; "
            "the driver was reloaded or the GPU reset: run again, with persistence mode on"
        )


class CounterStuckError(MeasurementError):
    """An energy counter does not move."""

    def __init__(self, device: str, joules: float, seconds: float) -> None:
        super().__init__(
            f"the energy counter of {device} stood still at {joules:.3f} J for {seconds:.1f} s; "
            "it does not measure: update the driver, or go on without joules: --no-energy"
        )


class CounterSlowError(MeasurementError):
    """The counter moves, but no move could be timed."""

    def __init__(self, device: str, seconds: float) -> None:
        super().__init__(
            f"no move of the energy counter of {device} could be timed within {seconds:.1f} s: "
            "reading it takes too long; end other tools that poll this GPU and run again"
        )


class NotANumberError(MeasurementError):
    """A reading is not a finite, non-negative number."""

    def __init__(self, device: str, what: str, value: float) -> None:
        super().__init__(
            f"{what} of {device} reads {value}, which is no energy; update the driver, {_WAY_ON}"
        )


class ImplausiblePowerError(MeasurementError):
    """The joules would mean a power the device cannot have."""

    def __init__(self, device: str, watts: float, low: float, high: float | None) -> None:
        bound = f"{low:.0f} W" if high is None else f"{low:.0f} to {high:.0f} W"
        super().__init__(
            f"the counter of {device} says {watts:.1f} W on average, outside {bound} "
            "(0.3 x idle to 1.3 x limit); the counter cannot be trusted here: "
            "check it with green-bench doctor"
        )


class WindowError(MeasurementError):
    """The window's times do not fit what the meter saw."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; call begin(), run the work between two time.monotonic() times of "
            "this machine, then call end() with them"
        )


class SamplerError(MeasurementError):
    """Power is not being sampled, and there is no counter."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"{problem}, and this GPU has no counter to read instead; "
            f"run again on a less loaded machine, {_WAY_ON}"
        )


class RaplError(MeasurementError):
    """RAPL counters are missing, unreadable or contradict themselves."""


class SimulatedSpecError(UsageError):
    """The file of a simulated device cannot be used."""


class AmbiguousDeviceError(UsageError):
    """``CUDA_VISIBLE_DEVICES`` does not say which GPU is meant."""
