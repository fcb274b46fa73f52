"""The settings file: every key means something, and an error names the nearest that does."""

import pytest

from minference_green.config import read
from minference_green.errors import UsageError

OPTIONS = {"run": ("model", "context", "no-energy"), "check": ("baseline", "max-blocks")}


@pytest.fixture
def settings(tmp_path):
    def write(text, file="green-bench.toml"):
        (tmp_path / file).write_text(text)
        return read(tmp_path, OPTIONS)

    return write


def test_no_file_is_no_settings(tmp_path):
    assert read(tmp_path, OPTIONS) is None


@pytest.mark.parametrize(
    ("file", "prefix"), [("green-bench.toml", ""), ("pyproject.toml", "tool.green-bench.")]
)
def test_both_files_say_the_same_things(settings, file, prefix):
    found = settings(
        f'[{prefix}run]\nmodel = "m"\nno_energy = true\n'
        f"[{prefix}check]\nmax-blocks = 10\n"
        f'[{prefix}criteria]\nlatency = "3 %"\nenergy_ratio = 0.04\n',
        file,
    )
    assert found.run == {"model": "m", "no-energy": True}
    assert found.check == {"max-blocks": 10}
    assert found.criteria == {"energy_ratio": 0.04, "latency": pytest.approx(0.03)}


def test_a_pyproject_of_something_else_is_no_settings(settings):
    assert settings("[tool.ruff]\nline-length = 100\n", "pyproject.toml") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\ncontxt = 1", r"\[run\] has no key 'contxt'; did you mean 'context'\?"),
        ("[run]\nzzz = 1", r"\[run\] has no key 'zzz'; it takes context, model, no-energy"),
        ("[chek]\nbaseline = 1", r"has no key 'chek'; did you mean 'check'"),
        ("[criteria]\nenergy = 0.05", r"no key 'energy'; did you mean 'energy_ratio'"),
        ("[criteria]\naudit_recall = 0.05", "has no key 'audit_recall'"),
        ('[criteria]\nlatency = "fast"', r"\[criteria\] latency 'fast' is not a margin"),
        ("[criteria]\nlatency = 5", "more than 0 % and less than 100 %"),
        ("[criteria]\nlatency = true", "is not a margin"),
        ("[criteria]\nenergy_absolute = 0.05", "only beside another"),
        ("run = 3", r"run must be a table, written \[run\]"),
        ("[run", "cannot be read as TOML"),
    ],
)
def test_what_means_nothing_is_an_error(settings, text, message):
    with pytest.raises(UsageError, match=message):
        settings(text)


def test_settings_in_both_files_are_refused(settings):
    settings("[run]\n")
    with pytest.raises(UsageError, match=r"in both green-bench\.toml and"):
        settings("[tool.green-bench.run]\n", "pyproject.toml")
