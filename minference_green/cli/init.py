"""``green-bench init``: a settings file and a CI workflow to begin with."""

from pathlib import Path
from typing import Annotated

import typer

from minference_green.errors import UsageError

SETTINGS = """\
# Settings of green-bench: defaults of its commands, and what a check judges. Flags win.

[run]
model = "embedded"                    # a local directory, or a hub id
methods = ["dense", "minference"]     # the first is the reference
# context = ["8k", "32k", "128k"]     # default: by device
# country = "FRA"                     # ISO code of the grid

[check]
baseline = "main"
max-blocks = 16                       # looks at 6, 10 and 16 blocks
on-inconclusive = "fail"              # or warn, pass

[criteria]
energy_ratio = "5%"                   # joules per token over the reference arm's
energy_absolute = "10%"               # the method's own joules; from five stored runs on
# latency = "5%"                      # seconds per token over the reference arm's
# memory = "2%"                       # peak device memory (GPU only)
# density = "10%"                     # what is computed of the causal pairs
# output_error = "20%"                # error of the last logits against the reference arm
# kl = "20%"                          # divergence of next tokens from the reference arm's
# top1 = "1%"                         # most likely tokens shared with the reference arm
# recall = "1%"                       # dense attention mass kept
"""

WORKFLOW = """\
name: energy
on:
  push:
    branches: [main]
  pull_request:
permissions:
  contents: read
concurrency: energy-gpu # one at a time: a shared GPU has no joules of its own
jobs:
  # Code of a fork never reaches your own machine: it gets the second job alone.
  check:
    if: >-
      github.event_name == 'push' ||
      github.event.pull_request.head.repo.full_name == github.repository
    runs-on: [self-hosted, gpu]
    timeout-minutes: 120
    steps:
      - uses: actions/checkout@v4
      - uses: actions/cache/restore@v4
        with:
          path: green-bench-runs/checks
          key: green-bench-${{ github.sha }}-${{ github.run_attempt }}
          restore-keys: green-bench-${{ github.sha }}-
      - run: python3 -m venv .green-bench && .green-bench/bin/pip install minference-green
      - run: >-
          .green-bench/bin/green-bench check --resume
          --junit green-bench.xml --markdown "$GITHUB_STEP_SUMMARY"
      # Also after a verdict that failed: a re-run appends to this ledger.
      - uses: actions/cache/save@v4
        if: always()
        with:
          path: green-bench-runs/checks
          key: green-bench-${{ github.sha }}-${{ github.run_attempt }}
  verify:
    runs-on: ubuntu-latest
    timeout-minutes: 20
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: pip install minference-green
      - run: green-bench check --verify-without-gpu
"""

FILES = {
    Path("green-bench.toml"): SETTINGS,
    Path(".github/workflows/energy.yml"): WORKFLOW,
}


def init(
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write green-bench.toml and a CI workflow into the current directory."""
    from minference_green.cli.compare import write

    there = [str(file) for file in FILES if file.exists()]
    if there and not force:
        raise UsageError(f"{', '.join(there)} exists; nothing was written (--force overwrites)")
    for file, text in FILES.items():
        write("init", file, text)
        typer.echo(f"Wrote {file}")
    typer.echo("Next: green-bench run, then green-bench baseline save main RUN, and commit both.")
