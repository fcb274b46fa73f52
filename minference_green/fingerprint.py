"""What a figure depends on, as far as it can be told without loading torch."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import minference_green

_PACKAGES = ("torch", "triton", "transformers", "codecarbon", "nvidia-ml-py")


def software(cuda: str | None) -> dict[str, str]:
    """Versions of Python, this package and the libraries under it."""
    versions = {
        "python": platform.python_version(),
        "minference-green": minference_green.__version__,
    }
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    if cuda:
        versions["cuda"] = cuda
    return versions


def kernel_hash() -> str:
    """Content hash of the kernel sources: the first thing a regression check asks about."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def code_version() -> tuple[str | None, bool | None]:
    """Commit this package runs from and whether the tree has changes; null outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    # An installed package may lie inside somebody else's repository.
    return repository_state(root) if (root / ".git").exists() else (None, None)


def repository_state(directory: Path) -> tuple[str | None, bool | None]:
    """Commit of the repository around ``directory``, and whether its tree has changes."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        dirty = bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, dirty


def tree_name(directory: Path) -> str:
    """A name for the state of the repository around ``directory``: commit and tracked changes."""
    try:
        state = _git(directory, "rev-parse", "HEAD") + _git(directory, "diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"
    return hashlib.sha256(state.encode()).hexdigest()[:12]


def commits_since(commit: str, directory: Path) -> int | None:
    """Commits between ``commit`` and where ``directory`` stands; null if it is unknown there."""
    try:
        return int(_git(directory, "rev-list", "--count", f"{commit}..HEAD"))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor's own name, with its logical cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name} ({os.cpu_count()} logical cores)"


def hostname_hash() -> str:
    """A name for this host that does not tell the name."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]
