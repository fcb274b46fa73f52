"""What this host's processors are called, and how many there are."""

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's own name."""
    names = _values("model name", cpuinfo)
    return names[0] if names else platform.processor() or platform.machine()


def sockets(cpuinfo: Path = _CPUINFO) -> int:
    """Number of processor packages; 1 where the system does not tell."""
    return max(1, len(set(_values("physical id", cpuinfo))))


def _values(key: str, cpuinfo: Path) -> list[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]
