import io
import time

import pytest
from rich.console import Console

from subfleet.dashboards.console import (
    ConsoleProgress,
    LoggedWarnings,
    Preparation,
    print_end,
    waiting,
)
from subfleet.platform.stretches import Stretch

ROWS = [
    {"tier": "high", "clients": 333, "params": 1_234_567, "mflops": 29.353, "accuracy": 0.777},
    {"tier": "[low]", "clients": 334, "params": 12, "mflops": None, "accuracy": float("nan")},
]


def console(terminal, width=100):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def play(progress, rounds, start=0):
    progress.on_start({"rounds": rounds, "start": start})
    for number in range(start + 1, rounds + 1):
        record = {"round": number, "loss_train": 1 / number, "clients_per_s": 12.34}
        if number == 2:
            record["acc_global"] = 0.5
        progress.on_round(record, {})
    progress.on_end({"finished": True})


def test_plain_lines_without_a_terminal():
    out = console(terminal=False, width=20)
    play(ConsoleProgress(40, out), 40)
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 2  # the first and, since no five seconds passed, the last
    assert lines[0] == "round 1/40  loss 1.000  clients/s 12.3"
    assert lines[1].startswith("round 40/40  acc 0.500  loss 0.025  clients/s 12.3  0s left")
    assert all("\x1b" not in line for line in lines)


def test_a_round_without_a_loss_shows_the_last_there_was():
    out = console(terminal=False)
    progress = ConsoleProgress(3, out, interval_s=0)
    progress.on_start({"rounds": 3})
    progress.on_round({"round": 1, "loss_train": 2.5}, {})
    progress.on_round({"round": 2, "loss_train": float("nan")}, {})
    assert "loss 2.500" in out.file.getvalue().splitlines()[1]


def test_every_round_when_asked():
    out = console(terminal=False)
    play(ConsoleProgress(5, out, interval_s=0), 5, start=2)
    assert [line.split()[1] for line in out.file.getvalue().splitlines()] == ["3/5", "4/5", "5/5"]


def test_a_live_bar_on_a_terminal():
    out = console(terminal=True)
    play(ConsoleProgress(4, out), 4)
    text = out.file.getvalue()
    assert "\x1b[" in text
    assert "4/4" in text and "acc 0.500" in text and "0s left" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_warnings_come_first_and_whole(terminal):
    out = console(terminal, width=20)
    progress = ConsoleProgress(4, out)
    progress.on_start({"rounds": 4, "warnings": ["a checkpoint [3] is damaged", "and more"]})
    progress.close()
    text = out.file.getvalue()
    assert text.startswith("warning: a checkpoint [3] is damaged\nwarning: and more\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_notes_are_whole_lines(terminal):
    out = console(terminal, width=20)
    progress = ConsoleProgress(4, out)
    progress.on_start({"rounds": 4})
    progress.on_note("engine: [8] traced, 9.1 ms a client's step")
    progress.close()
    assert "engine: [8] traced, 9.1 ms a client's step\n" in out.file.getvalue()


def test_without_a_console_warnings_are_logged(caplog):
    play(LoggedWarnings(), 2)
    assert caplog.text == ""
    LoggedWarnings().on_start({"warnings": ["a checkpoint is damaged"]})
    assert "a checkpoint is damaged" in caplog.text


def test_close_gives_the_terminal_back():
    out = console(terminal=True)
    progress = ConsoleProgress(4, out)
    progress.on_start({"rounds": 4})
    progress.close()
    progress.close()
    assert out.file.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again


def test_the_table_and_the_folder_last():
    out = console(terminal=False, width=60)
    folder = "/a/rather/long/path/" + "x" * 80
    print_end(ROWS, folder, out)
    lines = out.file.getvalue().splitlines()
    assert lines[-1] == folder
    text = "\n".join(lines[:-1])
    for cell in ("high", "[low]", "1,234,567", "29.35", "0.777", "–"):
        assert cell in text


def test_progress_goes_to_stderr(capsys):
    play(ConsoleProgress(2, interval_s=0), 2)
    got = capsys.readouterr()
    assert got.out == "" and "2/2" in got.err


def test_long_preparations_are_spoken_of_and_short_ones_are_not() -> None:
    for interval_s, words in [(0.0, "preparing data: read 3/17"), (60.0, "")]:
        console = Console(file=io.StringIO(), width=80)
        Preparation(console, interval_s=interval_s)("read", 3, 17)
        assert console.file.getvalue().strip() == words


def test_what_takes_long_is_said_with_its_time_again_and_again_and_what_does_not_is_not() -> None:
    out = console(terminal=False)
    with waiting(out, "sending [a]", first_s=60):
        pass
    assert out.file.getvalue() == ""
    with waiting(out, "sending [a]", first_s=0.02, interval_s=0.02) as step:
        while out.file.getvalue().count("\n") < 2:
            time.sleep(0.01)
        step("starting")
        while "starting" not in out.file.getvalue():
            time.sleep(0.01)
    said = out.file.getvalue()
    assert said.startswith("sending [a] ... 0s\nsending [a] ... 0s\n")
    assert said.endswith("starting ... 0s\n")
    time.sleep(0.1)
    assert out.file.getvalue() == said


# --- phases, and progress within a round ---------------------------------------------------------

PHASES = [Stretch("warm-up", 1, 2), Stretch("search", 3, 3), Stretch("train", 4, 6)]


class Clock:
    """Stands in for the module `time` where a test says what time it is."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("subfleet.dashboards.console.time", clock := Clock())
    return clock


def rounds_of(progress, clock, numbers, seconds):
    for number in numbers:
        clock.now += seconds
        progress.on_round({"round": number}, {})


def test_several_phases_are_named_and_each_goes_at_its_own_pace(clock):
    out = console(terminal=False)
    progress = ConsoleProgress(6, out, interval_s=0)
    progress.on_start({"rounds": 6, "start": 0, "phases": PHASES})
    rounds_of(progress, clock, (1, 2), 2)
    rounds_of(progress, clock, (3,), 20)
    rounds_of(progress, clock, (4, 5, 6), 10)
    assert out.file.getvalue().splitlines() == [
        "warm-up  round 1/6",
        "warm-up  round 2/6  8s left",
        "search  round 3/6  33s left",  # three rounds of (2 + 20) / 2
        "train  round 4/6",
        "train  round 5/6  10s left",
        "train  round 6/6  0s left",
    ]


def test_one_phase_is_not_named_however_often_it_comes_back():
    out = console(terminal=False)
    progress = ConsoleProgress(2, out, interval_s=0)
    progress.on_start({"rounds": 2, "phases": [Stretch("train", 1, 2)]})
    progress.on_round({"round": 1}, {})
    assert out.file.getvalue().startswith("round 1/2")


def test_a_long_round_says_every_few_seconds_how_many_clients_are_done(clock):
    out = console(terminal=False)
    progress = ConsoleProgress(6, out)
    progress.on_start({"rounds": 6, "start": 1, "phases": PHASES})
    progress.on_round({"round": 2}, {})
    progress.on_progress(0, 8, "train")
    for done in range(1, 9):
        clock.now += 3
        progress.on_progress(done, 8, "train")
    clock.now += 1
    progress.on_round({"round": 3}, {})
    assert out.file.getvalue().splitlines() == [
        "warm-up  round 2/6",
        "search  round 3/6  2/8 clients  1m30s left",  # 18 s of this round, 3 rounds of 24 s
        "search  round 3/6  4/8 clients  1m24s left",
        "search  round 3/6  6/8 clients  1m18s left",
        "search  round 3/6  8/8 clients  1m12s left",
    ]


def test_of_the_first_round_of_a_process_no_time_is_told(clock):
    """It tries out ways of computing, or compiles: it once promised hours for minutes."""
    out = console(terminal=False)
    progress = ConsoleProgress(400, out)
    progress.on_start({"rounds": 400, "start": 85})
    clock.now += 30
    progress.on_progress(4, 10, "train")
    clock.now += 30
    progress.on_round({"round": 86}, {})
    assert "left" not in out.file.getvalue() and "4/10 clients" in out.file.getvalue()
    for number in (87, 88):
        clock.now += 3
        progress.on_round({"round": number}, {})
    assert out.file.getvalue().splitlines()[-1] == "round 88/400  15m36s left"  # 312 of 3 s


def test_short_rounds_say_nothing_of_their_clients(clock):
    out = console(terminal=False)
    progress = ConsoleProgress(6, out, interval_s=0)
    progress.on_start({"rounds": 6, "phases": PHASES})
    for number in (1, 2):
        for done in (0, 1, 2):
            progress.on_progress(done, 2, "train")
            clock.now += 0.5
        progress.on_round({"round": number}, {})
    assert [line.split("  ")[:2] for line in out.file.getvalue().splitlines()] == [
        *(["warm-up", "round 1/6"], ["warm-up", "round 2/6"]),
    ]


def test_the_bar_names_the_phase_and_shows_a_long_rounds_clients(clock):
    out = console(terminal=True)
    progress = ConsoleProgress(6, out)
    progress.on_start({"rounds": 6, "start": 2, "phases": PHASES})
    progress.on_progress(3, 10, "train")
    clock.now += 9  # no bundle came in meanwhile: the bar is drawn again all the same
    progress.close()
    text = out.file.getvalue()
    assert "train  round" not in text and "warm-up  round 2/6 " in text
    assert "search  round 3/6  3/10 clients" in text


def test_a_round_says_what_it_does_before_and_after_its_training(clock):
    out = console(terminal=False)
    progress = ConsoleProgress(2, out)
    progress.on_start({"rounds": 2})
    for doing, done, total in (("try", 1, 3), ("train", 4, 8), ("evaluate", 20, 40)):
        clock.now += 10
        progress.on_progress(done, total, doing)
    clock.now += 10
    progress.on_round({"round": 1}, {})
    for doing, done, total in (("train", 4, 8), ("evaluate", 20, 40)):
        clock.now += 10
        progress.on_progress(done, total, doing)
    assert out.file.getvalue().splitlines() == [
        "round 1/2  1/3 variants tried out",
        "round 1/2  4/8 clients",
        "round 1/2  evaluating 20/40 clients",
        "round 1/2",
        "round 2/2  4/8 clients  10s left",  # half of a round of 20 s
        "round 2/2  evaluating 20/40 clients  0s left",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_who_joins_a_run_knows_its_pace_and_its_last_values_at_once(clock, terminal):
    out = console(terminal)
    progress = ConsoleProgress(9, out)
    recent = [
        {"round": 3, "acc_global": 0.25, "loss_train": 2.0, "seconds": {"total": 3.0}},
        {"round": 4, "acc_global": None, "loss_train": 1.5, "seconds": {"total": 5.0}},
    ]
    progress.on_start({"rounds": 10, "start": 4, "recent": recent, "since_s": 6.0})
    assert "round 4/10 " in out.file.getvalue()
    clock.now += 6
    progress.on_round({"round": 5}, {})
    progress.close()
    text = out.file.getvalue()
    assert "acc 0.250  loss 1.500  30s left" in text  # six rounds of 5 s
    if not terminal:
        assert len(text.splitlines()) == 2
        assert "round 5/10  acc 0.250  loss 1.500  42s left" in text  # five of (5 + 12) / 2
