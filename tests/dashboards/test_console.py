import io

import pytest
from rich.console import Console

from subfleet.dashboards.console import ConsoleProgress, LoggedWarnings, Preparation, print_end

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
    assert lines[0].startswith("round 1/40  loss 1.000  clients/s 12.3  ")
    assert lines[1].startswith("round 40/40  acc 0.500  loss 0.025  clients/s 12.3  0s left")
    assert all("\x1b" not in line for line in lines)


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
