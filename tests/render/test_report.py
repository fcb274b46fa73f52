"""What a report says of a run: the same rows on every surface, doubts included."""

import csv
import io
import json
import resource

import pytest
from rich.console import Console
from typer.testing import CliRunner

from minference_green.render import export
from minference_green.render.conclusion import conclusion
from minference_green.render.document import document
from minference_green.render.markdown import markdown
from minference_green.render.numbers import figure, percent, significant
from minference_green.render.rows import doubts, facts, rows
from minference_green.render.table import plain, show
from minference_green.results import Backends, EmissionFactor, Note, Skip
from minference_green.stats import Estimate, cells, comparisons

SURFACES = {
    "table": lambda run: plain(document(run)),
    "terminal": lambda run: terminal(run, 200),
    "markdown": lambda run: markdown(document(run)),
    "csv": export.as_csv,
    "json": export.as_json,
}


def terminal(run, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show(document(run), console)
    return console.file.getvalue()


@pytest.fixture(params=SURFACES)
def surface(request):
    return SURFACES[request.param]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((21034.0, 20890.0, 21180.0), "21000"),
        ((13034.0, 13030.0, 13038.0), "13030"),
        ((0.39264, 0.3894, 0.3958), "0.393"),
        ((5.0, 1.0, 9.0), "5.0"),
        ((5300.0, 100.0, 90000.0), "5300"),
        ((996.0, 800.0, 1190.0), "1000"),
        ((1234.5678, None, None), "1230"),
        ((0.000123456, None, None), "0.000123"),
        ((250.0, 250.0, 250.0), "250.0"),
        ((0.0, 0.0, 0.0), "0"),
        ((None, None, None), "n/a"),
    ],
)
def test_a_figure_has_the_digits_its_interval_justifies(estimate, text):
    assert figure(Estimate(*estimate, blocks=3)) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        ((0.381, 0.362, 0.402), "38 % [36, 40]"),
        ((0.381, 0.377, 0.385), "38.1 % [37.7, 38.5]"),
        ((-0.05, -0.07, -0.03), "-5 % [-7, -3]"),
        ((-0.001, -0.02, 0.02), "0 % [-2, 2]"),
        ((0.381, None, None), "38 %"),
        ((None, None, None), "n/a"),
    ],
)
def test_a_saving_is_per_cent_with_its_interval(estimate, text):
    assert percent(Estimate(*estimate, blocks=3)) == text


def test_zero_and_null_are_not_the_same_text():
    assert significant(0.0, 3) == "0"
    assert significant(None, 3) == "n/a"


def test_rows_stand_for_every_length_and_arm_in_the_order_asked_for(six_blocks):
    found = [(r.cell.context_length, r.cell.method) for r in rows(six_blocks)]
    assert found == [
        (8192, "dense"),
        (8192, "minference"),
        (32768, "dense"),
        (32768, "minference"),
    ]
    assert rows(six_blocks)[0].against_reference is None
    assert rows(six_blocks)[1].top1_agreement == 0.96875


def test_planted_weights_stand_on_every_surface(six_blocks, surface):
    assert "planted weights" in surface(six_blocks)


@pytest.mark.parametrize("word", ["modelled", "simulated"])
def test_the_energy_source_stands_on_every_surface(make_run, surface, word):
    run = make_run({(8192, "dense"): [[9.0]], (8192, "minference"): [[5.0]]}, obtained=word)
    assert word in surface(run)


def test_simulated_joules_are_a_doubt_and_stand_in_the_conclusion(make_run):
    energy = {(8192, "dense"): [[9.0]], (8192, "minference"): [[5.0]]}
    run = make_run(energy, obtained="simulated")
    assert any("simulated" in doubt for doubt in doubts(run))
    assert "simulated energy" in conclusion(run)[0]
    assert not any("simulated" in doubt for doubt in doubts(make_run(energy)))


def test_every_surface_shows_the_same_saving(six_blocks):
    saving = comparisons(six_blocks)[1].energy_saving
    shown = percent(saving)
    assert shown == "60.0 % [59.5, 60.5]"
    for name in ("table", "terminal", "markdown"):
        assert shown in SURFACES[name](six_blocks), name
    record = export.records(six_blocks)[3]
    assert record["energy_saving"] == saving.value
    assert json.loads(export.as_json(six_blocks))["cells"][3] == record


def test_density_stands_in_the_same_line_as_every_speed_up(six_blocks):
    lines = [line for line in plain(document(six_blocks)).splitlines() if "x [" in line]
    assert len(lines) == 2
    assert all(" 0.12 " in line for line in lines)


def test_csv_has_one_row_per_cell_in_full_precision_with_units_in_names(six_blocks):
    table = list(csv.DictReader(io.StringIO(export.as_csv(six_blocks))))
    assert len(table) == 4
    value = cells(six_blocks)[0].joules_per_mtok.value
    assert float(table[0]["joules_per_mtok"]) == value
    assert {"seconds_per_mtok", "operational_g_per_mtok", "ttft_seconds"} <= table[0].keys()
    assert table[0]["energy_saving"] == ""
    assert table[0]["energy_saving_reason"] == "this is the reference"


def test_facts_name_machine_factor_and_plan(six_blocks):
    told = dict(facts(six_blocks))
    assert "NVIDIA H200, limit 700 W, driver 580.1" in told["Machine"]
    assert "56.039 gCO2e/kWh for FRA, 2023, average, lifecycle, a table" in told["Carbon"]
    assert "PUE 1.2" in told["Carbon"]
    assert told["Plan"].startswith("6 blocks, windows of 10 s or more")
    assert told["Energy"] == "NVML total energy counter of NVIDIA H200"
    assert "Dense kernel" not in told


def test_the_dense_kernel_measured_against_is_named(make_run):
    chosen = Backends(
        block=0, context_length=8192, dtype="bfloat16", seconds={"cudnn": 0.1}, chosen="cudnn"
    )
    run = make_run({(8192, "dense"): [[9.0]], (8192, "minference"): [[5.0]]}, events=[chosen])
    assert dict(facts(run))["Dense kernel"].startswith("cudnn")


def test_a_clean_run_has_no_doubts(six_blocks):
    assert doubts(six_blocks) == ()


def test_null_joules_are_na_with_a_numbered_reason_and_never_zero(make_run):
    keys = ((8192, "dense"), (8192, "minference"))
    run = make_run({k: [[None], [None]] for k in keys}, seconds={k: [[2.0], [2.0]] for k in keys})
    text = plain(document(run))
    row = next(line for line in text.splitlines() if line.startswith("8k       dense"))
    assert row.split() == ["8k", "dense", "n/a", "(1)", *["n/a", "(2)"] * 3, "2.000", "0.03277"]
    assert "(1) not observed in this run" in text
    assert "(2) the counter stood still" in text
    assert "energy that is not known" in text


def test_a_skipped_cell_keeps_its_row_and_its_reason(make_run):
    skip = Skip(block=0, context_length=8192, method="minference", reason="out of memory at 8k")
    run = make_run({(8192, "dense"): [[9.0], [9.1]], (8192, "minference"): []}, events=[skip])
    text = plain(document(run))
    assert "! Skipped minference at 8k: out of memory at 8k" in text
    assert "skipped: out of memory at 8k" in text
    assert conclusion(run) == (
        "minference was not compared with dense: minference: skipped: out of memory at 8k.",
    )


def test_an_unfinished_run_shows_what_it_has_and_how_to_go_on(make_run, tmp_path):
    run = make_run(
        {(8192, "dense"): [[9.0], [9.1]], (8192, "minference"): [[5.0], [5.1]]},
        blocks_planned=6,
        blocks_finished=1,
    )
    (told,) = doubts(run, tmp_path / "my runs" / "the-run")
    assert told.endswith(f"--resume the-run --output '{tmp_path}/my runs'")
    (told,) = doubts(run, tmp_path / "runs" / "the-run")
    assert told == (
        "Incomplete: 1 of 6 blocks finished. Go on with: "
        f"green-bench run --resume the-run --output {tmp_path / 'runs'}"
    )
    assert "44 %" in plain(document(run))


def test_a_run_without_a_single_window_still_renders(make_run, surface):
    run = make_run({(8192, "dense"): [[]], (8192, "minference"): [[]]}, blocks_planned=3)
    run = run.model_copy(update={"events": ()})
    assert "not measured yet" in surface(run)


def test_a_quick_run_is_marked(six_blocks):
    plan = six_blocks.header.plan.model_copy(update={"quick": True})
    header = six_blocks.header.model_copy(update={"plan": plan})
    run = six_blocks.model_copy(update={"header": header})
    assert doubts(run)[0].startswith("Quick run")
    assert dict(facts(run))["Plan"].endswith(", quick")


def test_a_cut_line_is_told(six_blocks):
    assert "cut short" in doubts(six_blocks.model_copy(update={"cut": True}))[0]


def test_alike_marks_of_windows_are_told_once_with_their_number(make_run):
    energy = {(8192, "dense"): [[9.0, 9.1], [9.2, 9.3]]}
    run = make_run(energy, marks=("short: 1.52 s, below 2 s; raise --window",))
    assert doubts(run) == ("4 of 4 windows: short: 1.52 s, below 2 s; raise --window",)


def test_invalid_windows_are_told_with_their_reason(make_run):
    run = make_run(
        {(8192, "dense"): [[9.0, 9.1], [9.2, 9.3]]},
        invalid={(0, 0, "dense"): "thermal slowdown for 0.3 s of the window"},
    )
    (told,) = doubts(run)
    assert told.startswith("Left out as invalid, 1 of 4 windows: thermal slowdown")
    assert [(r.cell.windows_used, r.cell.windows_invalid) for r in rows(run)] == [(3, 1)]


def test_windows_of_a_block_started_again_are_told(make_run):
    run = make_run({(8192, "dense"): [[9.0], [9.1]]})
    again = [e for e in run.events if e.block == 1]
    joined = run.model_copy(update={"events": (*run.events, *again)})
    assert doubts(joined) == ("1 windows of interrupted blocks were measured anew and not used.",)


def test_notes_of_the_run_are_told_once(make_run):
    note = Note(message="another process used 3 % of the GPU")
    run = make_run({(8192, "dense"): [[9.0]]}, events=[note, note])
    assert doubts(run) == (note.message,)


def test_an_assumed_location_marks_every_line_of_grams(six_blocks):
    grid = EmissionFactor(
        g_per_kwh=475.0,
        location="world average",
        year=2023,
        kind="average",
        boundary="lifecycle",
        source="a table",
        assumed=True,
    )
    carbon = six_blocks.header.carbon.model_copy(update={"factor": grid})
    header = six_blocks.header.model_copy(update={"carbon": carbon})
    run = six_blocks.model_copy(update={"header": header})
    sheet = document(run).sheets[0]
    grams = [row[sheet.columns.index("gCO2e/Mtok")] for row in sheet.rows]
    assert all(text.endswith(" (1)") for text in grams)
    assert document(run).footnotes[0].startswith("assumed: world average")
    assert any("Name yours with --country" in doubt for doubt in doubts(run))
    assert "assumed" in markdown(document(run))


def test_the_conclusion_says_how_much_less_at_which_density_and_how_it_is_known(six_blocks):
    (sentence,) = conclusion(six_blocks)
    assert sentence == (
        "At 32k tokens minference used 60.0 % [59.5, 60.5] less energy than dense and took "
        "60.0 % [59.5, 60.5] less time, at density 0.12 (planted weights, counter energy). "
        "It used less energy at every length compared; its interval is clear of zero from about "
        "8.0k tokens on."
    )


def pair(make_run, ratio, blocks=4, spread=0.01, **more):
    wobble = [spread * (i - (blocks - 1) / 2) for i in range(blocks)]
    return make_run(
        {
            (8192, "dense"): [[100.0]] * blocks,
            (8192, "minference"): [[100.0 * ratio * (1 + w)] for w in wobble],
        },
        **more,
    )


def test_a_method_that_costs_more_is_said_to_cost_more(make_run):
    (sentence,) = conclusion(pair(make_run, 1.05))
    assert "used 5 % [3, 7] more energy than dense and took 5 % [3, 7] more time" in sentence
    assert "at density n/a" in sentence


def test_an_interval_over_zero_is_no_difference(make_run):
    (sentence,) = conclusion(pair(make_run, 1.001))
    assert "was not shown to differ from dense in energy (0 % [-2, 1] saved)" in sentence
    assert "less" not in sentence
    assert "more" not in sentence


def test_a_single_block_is_not_taken_for_proof(make_run):
    (sentence,) = conclusion(pair(make_run, 0.6, blocks=1))
    assert "40 % less energy than dense (one block, and an interval takes two)" in sentence


def test_the_break_even_length_is_told_with_its_interval(make_run):
    wobble = (-0.01, 0.0, 0.01)
    energy = {}
    for length, ratio in ((4096, 1.2), (16384, 0.8)):
        energy[length, "dense"] = [[100.0]] * 3
        energy[length, "minference"] = [[100.0 * ratio * (1 + w)] for w in wobble]
    (sentence,) = conclusion(make_run(energy))
    assert sentence.endswith("It saves energy from about 7.5k tokens on [7.0k, 7.9k].")


def test_a_run_of_one_method_has_nothing_to_conclude(make_run):
    run = make_run({(8192, "dense"): [[9.0], [9.1]]})
    assert conclusion(run) == ("dense alone was measured; there is nothing to compare it with.",)
    assert "Energy saved" not in plain(document(run))


def test_names_from_users_are_neither_markup_nor_markdown(make_run):
    name = "[red]a|b](http://x) <b>"
    run = make_run(
        {(8192, "dense"): [[9.0], [9.1]], (8192, name): [[5.0], [5.1]]},
        fingerprint={"model": "m`*_\nx"},
    )
    assert name in terminal(run, 300)
    text = markdown(document(run))
    assert "a\\|b]\\(http://x) \\<b\\>" in text
    assert "m\\`\\*\\_ x" in text
    table_lines = [line for line in text.splitlines() if line.startswith("| 8k")]
    assert {line.replace("\\|", "").count("|") for line in table_lines} == {7, 9, 6}


def test_plain_lines_hold_no_terminal_control_and_no_trailing_blanks(six_blocks):
    text = plain(document(six_blocks))
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_narrow_terminal_loses_no_figure(six_blocks):
    wide, narrow = terminal(six_blocks, 200), terminal(six_blocks, 60)
    assert "10410" in wide
    assert "10410" in narrow


@pytest.fixture
def command():
    import typer

    from minference_green.cli.report import report

    app = typer.Typer()
    app.command()(report)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def run_directory(six_blocks, tmp_path):
    from minference_green.journal import Journal
    from minference_green.results import FILE_NAME

    directory = tmp_path / "a-run"
    with Journal(directory / FILE_NAME) as journal:
        for event in (six_blocks.header, *six_blocks.events):
            journal.append(event)
    return directory


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json"])
def test_the_command_prints_a_run_from_its_directory_or_file(
    command, run_directory, six_blocks, form
):
    wanted = {
        "table": plain(document(six_blocks, run_directory)),
        "markdown": markdown(document(six_blocks, run_directory)),
        "csv": export.as_csv(six_blocks),
        "json": export.as_json(six_blocks, run_directory),
    }[form]
    assert command(run_directory, "--format", form).output == wanted
    assert command(run_directory / "run.jsonl", "--format", form).output == wanted


def test_the_command_writes_to_a_file(command, run_directory, six_blocks, tmp_path):
    done = command(run_directory, "-f", "csv", "-o", tmp_path / "cells.csv")
    assert (done.exit_code, done.output) == (0, "")
    assert (tmp_path / "cells.csv").read_text() == export.as_csv(six_blocks)


def test_an_output_that_cannot_be_written_is_a_usage_error(command, run_directory, tmp_path):
    done = command(run_directory, "-o", tmp_path / "no" / "such.md")
    assert type(done.exception).__name__ == "UsageError"
    assert "choose another --output" in str(done.exception)


def test_half_a_report_is_left_nowhere(command, run_directory, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        done = command(run_directory, "-o", tmp_path / "report.md")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write the report" in str(done.exception)
    assert not (tmp_path / "report.md").exists()
    (tmp_path / "old.md").write_text("before")
    command(run_directory, "-o", tmp_path / "old.md" / "x")
    assert (tmp_path / "old.md").read_text() == "before"


def test_a_run_that_is_not_there_is_a_usage_error(command, tmp_path):
    done = command(tmp_path / "none")
    assert type(done.exception).__name__ == "UsageError"
    assert "cannot read run" in str(done.exception)
