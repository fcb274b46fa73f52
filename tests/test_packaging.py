"""What a user installs: the wheel, and a repository that does not shadow other packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
KERNEL_FILES = sorted(p.name for p in (REPOSITORY / "kernels").glob("*.py"))


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the committed and working files, built as a stranger would build it."""
    source = tmp_path_factory.mktemp("source")
    listed = run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY
    )
    names = [n for n in listed.stdout.split("\0") if n and os.path.lexists(REPOSITORY / n)]
    archive = subprocess.run(
        ["tar", "-C", str(REPOSITORY), "-cf", "-", *names], capture_output=True, check=True
    )
    subprocess.run(["tar", "-C", str(source), "-xf", "-"], input=archive.stdout, check=True)
    out = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        out,
        source,
        cwd=out,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_kernels_and_no_top_level_package_of_that_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in KERNEL_FILES:
        assert f"minference_green/kernels/{name}" in names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"minference_green"}


def test_the_wheel_holds_the_laws_of_attention_times(wheel: Path) -> None:
    laws = REPOSITORY / "minference_green" / "methods" / "laws"
    stored = {f"minference_green/methods/laws/{path.name}" for path in laws.glob("*.json")}
    assert "minference_green/methods/laws/cpu.json" in stored
    assert stored <= set(zipfile.ZipFile(wheel).namelist())


def test_the_command_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        target,
        wheel,
        cwd=tmp_path,
    )
    code = (
        "import sys, minference_green.kernels.index as i; print(i.__file__);"
        "from minference_green.cli.app import main; sys.argv = ['green-bench', '--version']; main()"
    )
    done = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    file, version = done.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    assert version.startswith("green-bench ")


def test_pytest_finds_the_plugin_of_the_installed_wheel_and_loads_it_once(
    wheel: Path, tmp_path: Path
) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
    run(*pip, target, wheel, cwd=tmp_path)
    for twice in ((), ("-p", "minference_green.pytest_plugin")):
        done = run(
            sys.executable, "-P", "-m", "pytest", *twice, "--help",
            cwd=tmp_path, PYTHONPATH=str(target),
        )  # fmt: skip
        assert done.stdout.count("--green-save") == 1


def test_transformers_works_with_the_repository_root_first_on_the_path() -> None:
    code = (
        "import sys; sys.path.insert(0, '.');"
        "import torch; from transformers import LlamaConfig, LlamaForCausalLM;"
        "c = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,"
        " num_attention_heads=2);"
        "print(LlamaForCausalLM(c)(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape)"
    )
    done = run(sys.executable, "-c", code, cwd=REPOSITORY)
    assert "torch.Size([1, 4, 32])" in done.stdout


def test_no_package_marker_turns_the_kernels_folder_into_a_top_level_package() -> None:
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    assert (REPOSITORY / "minference_green" / "kernels").is_symlink()
