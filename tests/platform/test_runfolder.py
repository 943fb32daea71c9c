import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.files import write_atomic
from subfleet.platform.record import Choice, EngineRecord
from subfleet.platform.runfolder import RunFolder

CONFIG = "[run]\nseed = 1\nrounds = 10\n[train]\nlr = 0.1\n"


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_create_then_open(tmp_path):
    made = RunFolder.create(tmp_path / "a" / "run", CONFIG, "f1")
    assert made.config.read_text() == CONFIG
    assert names(made.path) == ["checkpoints", "clients", "config.toml", "environment.json"]
    facts = json.loads(made.environment.read_text())
    assert facts["fingerprint"] == "f1"
    assert facts["packages"]["numpy"] and facts["cores"] >= 1
    assert facts["memory_bytes"] > 2**28
    assert os.uname().nodename not in made.environment.read_text().split('"')
    assert RunFolder.open(made.path, "f1") == made
    assert made.environment_changes() == []


def test_an_empty_folder_is_taken(tmp_path):
    assert RunFolder.create(tmp_path, CONFIG, "f1").config.exists()


def test_folders_in_use_are_refused_and_left_alone(tmp_path):
    RunFolder.create(tmp_path / "run", CONFIG, "f1")
    with pytest.raises(InputError, match="holds another run; --resume to go on"):
        RunFolder.create(tmp_path / "run", CONFIG, "f1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"\(thesis.tex\); give a folder that is absent"):
        RunFolder.create(tmp_path / "other", CONFIG, "f1")
    assert names(tmp_path / "other") == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        RunFolder.create(tmp_path / "other" / "thesis.tex", CONFIG, "f1")
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder.create(tmp_path / "other" / "thesis.tex" / "run", CONFIG, "f1")


def test_open_refuses_another_experiment_and_names_the_keys(tmp_path):
    RunFolder.create(tmp_path, CONFIG, "f1")
    with pytest.raises(InputError, match=r"train.lr = 0.1 there, 0.2 here"):
        RunFolder.open(tmp_path, "f2", CONFIG.replace("0.1", "0.2"))
    hosts = CONFIG.replace("0.1", "0.2").replace("rounds = 10", "rounds = 9\nhosts = 2")
    with pytest.raises(InputError, match=r"experiment \(train.lr = 0.1 there, 0.2 here\) "):
        RunFolder.open(tmp_path, "f2", hosts)  # which may differ is no reason
    with pytest.raises(InputError, match=r"train.momentum = absent there, 0.9 here"):
        RunFolder.open(tmp_path, "f2", CONFIG + "momentum = 0.9\n")
    with pytest.raises(InputError, match=r"another experiment .fingerprint f1, this one f2"):
        RunFolder.open(tmp_path, "f2", "not [ toml")


def test_open_refuses_other_data_and_says_what_differs(tmp_path):
    facts = {"name": "mine", "clients": 89, "fingerprint": "a" * 64}
    RunFolder.create(tmp_path, CONFIG, "f1", facts)
    RunFolder.open(tmp_path, "f1", CONFIG, facts)
    with pytest.raises(InputError, match=r"run on other data \(clients 89 there, 90 here\)"):
        RunFolder.open(tmp_path, "f1", CONFIG, facts | {"clients": 90})
    with pytest.raises(InputError, match=r"fingerprint a{12}… there, b{12}… here"):
        RunFolder.open(tmp_path, "f1", CONFIG, facts | {"fingerprint": "b" * 64})


def test_paths_are_absolute_wherever_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = RunFolder.create("run", CONFIG, "f1")
    assert made.path == RunFolder.open("run", "f1").path == tmp_path / "run"


def test_discard_takes_what_the_run_wrote_and_nothing_else(tmp_path):
    for name, found in [("new", False), ("found", True), ("shared", True)]:
        path = tmp_path / name
        if found:
            path.mkdir()
        made = RunFolder.create(path, CONFIG, "f1")
        made.write_record(EngineRecord())
        made.write_tiers([])
        made.tensorboard.mkdir()
        (made.tensorboard / "events").write_text("x")
        if name == "shared":
            (path / "notes.txt").write_text("mine")
        assert not made.begun
        made.discard()
    assert names(tmp_path) == ["found", "shared", "shared/notes.txt"]


def test_a_run_has_begun_with_its_first_line(tmp_path):
    made = RunFolder.create(tmp_path, CONFIG, "f1")
    made.metrics.write_text("")
    assert not made.begun
    made.metrics.write_text('{"round": 1}\n')
    assert made.begun


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        RunFolder.open(tmp_path / "absent", "f1")
    RunFolder.create(tmp_path, CONFIG, "f1").environment.write_text('{"fing')
    with pytest.raises(InputError, match=r"environment.json: cannot be read"):
        RunFolder.open(tmp_path, "f1")


def test_engine_summary_and_final(tmp_path):
    folder = RunFolder.create(tmp_path, CONFIG, "f1")
    assert folder.read_engine() is None and folder.read_summary() is None
    folder.write_record(EngineRecord((Choice("a", "cpu", "loop"),)))
    folder.write_summary({"acc_global": float("nan"), "rounds": 3})
    weights = {"w": torch.arange(6.0).reshape(2, 3).T}
    folder.write_final(weights)
    assert folder.read_engine()["choices"][0]["variant"] == "a"
    assert folder.read_summary() == {"acc_global": None, "rounds": 3}
    assert torch.equal(folder.read_final()["w"], weights["w"])
    assert not [name for name in names(tmp_path) if "tmp" in name]


def test_one_process_at_a_time(tmp_path):
    folder = RunFolder.create(tmp_path, CONFIG, "f1")
    held = folder.lock()
    with pytest.raises(InputError, match="another process"):
        folder.lock()
    os.close(held)
    os.close(folder.lock())


def in_a_full_place(code: str, *args: str) -> str:
    """Runs code in a process whose files may not grow beyond 8 kB: a real failing write."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
    done = subprocess.run(
        [sys.executable, "-c", limit + textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "checkpoints" / "round-000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "round-000005" / "manifest.json").write_text("{}")
    write_atomic(tmp_path / "engine.json", b"old")
    out = in_a_full_place(
        """
        import sys; from pathlib import Path
        from subfleet.core.errors import RunFailed
        from subfleet.platform.files import write_atomic
        try:
            write_atomic(Path(sys.argv[1]), b"x" * 20000)
        except RunFailed as error:
            print(error)
        """,
        str(tmp_path / "engine.json"),
    )
    assert f"disk full while writing {tmp_path / 'engine.json'} (needs 20000 bytes, " in out
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'round-000005'};" in out
    assert "free space and --resume" in out
    assert (tmp_path / "engine.json").read_bytes() == b"old"
    assert names(tmp_path) == [
        "checkpoints",
        "checkpoints/round-000005",
        "checkpoints/round-000005/manifest.json",
        "engine.json",
    ]


def test_a_full_disk_in_every_writer_leaves_nothing_half_written(tmp_path):
    out = in_a_full_place(
        """
        import sys; from pathlib import Path
        import numpy as np
        from subfleet.core.errors import RunFailed
        from subfleet.platform import checkpoint
        from subfleet.platform.kept import KeptStore
        from subfleet.platform.metrics import ClientsLog, MetricsLog
        from subfleet.platform.runfolder import RunFolder
        root = Path(sys.argv[1])

        def fails(action):
            try:
                action()
            except RunFailed as error:
                assert "disk full while writing" in str(error)
                return
            raise SystemExit("it should have failed")

        fails(lambda: RunFolder.create(root / "big", "#" * 9000, "f"))
        assert not (root / "big").exists()
        run = RunFolder.create(root / "run", "", "f")

        log = MetricsLog(run.metrics)
        log.append({"round": 1, "loss_train": 0.5})
        fails(lambda: log.append({"round": 2, "text": "x" * 9000}))
        log.append({"round": 2})
        assert [r["round"] for r in log.read()] == [1, 2]

        checkpoint.save(run.checkpoints, 1, {"a": 1}, fingerprint="f")
        big = {"w": np.random.default_rng(0).random(2000)}
        fails(lambda: checkpoint.save(run.checkpoints, 2, big, fingerprint="f"))
        assert [p.name for p in run.checkpoints.iterdir()] == ["round-000001"]
        assert checkpoint.load_latest(run.checkpoints, fingerprint="f").state == {"a": 1}

        clients = ClientsLog(run.clients)
        clients.add(1, {"loss": big["w"], "client": (big["w"] * 1e9).astype(int)})
        fails(clients.flush)
        assert not list(run.clients.iterdir())

        store = KeptStore(run.kept)
        store.write([1], [{"w": np.ones(500)}])
        fails(lambda: store.write([1, 2], [{"w": np.zeros(500)}, {"w": np.zeros(500)}]))
        assert store.read([1, 2])[0]["w"].sum() == 500 and store.read([2]) == [None]
        store.write([2], [{"w": np.ones(500)}])
        fails(lambda: run.write_final({"w": __import__("torch").ones(5000)}))
        print(sorted(p.name for p in run.path.iterdir()))
        """,
        str(tmp_path),
    )
    assert eval(out) == [
        "checkpoints",
        "clients",
        "config.toml",
        "environment.json",
        "kept",
        "metrics.jsonl",
    ]


def test_a_really_full_file_system(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        folder = RunFolder.create(place / "run", CONFIG, "f1")
        before = names(place)
        with pytest.raises(RunFailed, match=r"needs 4000\d\d bytes, \d+ free.*no checkpoint yet"):
            folder.write_final({"w": torch.zeros(100_000)})
        assert names(place) == before
    finally:
        subprocess.run(["umount", str(place)], check=True)
