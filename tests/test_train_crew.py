"""A crew of workers: failures and kills lose nothing else, memory is respected. The workers here train nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveal.data import DataError
from foveal.train import DivergedError, RunError, Settings, crew
from foveal.train.crew import environment, train_all
from foveal.train.room import Held, has_room, held

GB = 10**9

# answers as foveal.train.worker does, by what the run's name asks for
WORKER = """
import json, os, signal, sys, time
log = open(os.environ["CREW_LOG"], "a", buffering=1)
for line in sys.stdin:
    name = json.loads(line)["name"]
    def answer(what):
        print(json.dumps(what), flush=True)
    print("begin", name, os.getpid(), file=log)
    if "fails" in name:
        answer({"error": "training diverged", "kind": "DivergedError"})
        continue
    if "bug" in name:
        answer({"error": "'lost'", "kind": "KeyError"})
        continue
    if "data" in name:
        answer({"error": "no such images", "kind": "DataError"})
        continue
    if "warns" in name:
        print("MapWarning: some maps", file=sys.stderr, flush=True)
        time.sleep(0.1)  # so that it is heard before the run ends
    if "slow" in name:
        time.sleep(0.3)
    print("epoch", name, os.getpid(), file=log)
    answer({"epoch": {"epoch": 1}})
    if "dies" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in name:
        time.sleep(0.3)
    print("end", name, os.getpid(), file=log)
    answer({"done": name})
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(crew, "WORKER", (sys.executable, "-c", WORKER))
    monkeypatch.setenv("CREW_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def runs(*names: str) -> list[Settings]:
    return [Settings(data="digits", device="cpu", name=name) for name in names]


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()]


def at_once(log: Path) -> int:
    """The most runs that were at work at one time."""
    now = most = 0
    for what, *_ in lines(log):
        now += {"begin": 1, "end": -1, "epoch": 0}[what]
        most = max(most, now)
    return most


@pytest.mark.parametrize("jobs", [1, 2])
def test_failures_and_kills_do_not_stop_the_others(log: Path, jobs: int):
    told: list[tuple[str, dict]] = []
    failed = train_all(
        runs("a", "b-fails", "c-dies", "d", "e-bug", "f"), jobs, lambda name, row: told.append((name, row))
    )
    assert sorted(failed) == ["b-fails", "c-dies", "e-bug"]
    assert isinstance(failed["b-fails"], DivergedError)
    assert str(failed["b-fails"]) == "training diverged"
    assert isinstance(failed["c-dies"], RunError)
    assert "code -9 (killed: out of memory?)" in str(failed["c-dies"])
    assert str(failed["e-bug"]) == "KeyError: 'lost'"
    assert sorted(name for name, row in told if row == {}) == ["a", "d", "f"]
    assert dict(told)["b-fails"] == {"failed": "training diverged"}
    assert sorted(name for name, row in told if "epoch" in row) == ["a", "c-dies", "d", "f"]


def test_a_worker_is_kept_after_a_run_and_replaced_after_a_failure(log: Path):
    train_all(runs("a", "b", "c-fails", "d"), 1, lambda name, row: None)
    pid = {name: number for what, name, number in lines(log) if what == "begin"}
    assert pid["a"] == pid["b"] == pid["c-fails"]
    assert pid["d"] != pid["a"]


def test_what_a_worker_says_is_passed_on(log: Path):
    told: list[tuple[str, dict]] = []
    assert train_all(runs("a-warns"), 1, lambda name, row: told.append((name, row))) == {}
    assert told[0] == ("a-warns", {"said": "MapWarning: some maps"})


def test_wrong_data_ends_all(log: Path):
    with pytest.raises(DataError, match="no such images"):
        train_all(runs("a-data", "b", "c"), 1, lambda name, row: None)
    assert [name for _, name, _ in lines(log)] == ["a-data"]


def test_nothing_runs_after_ctrl_c(log: Path):
    def stop(name: str, row: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(runs("a-slow", "b-slow", "c-slow"), 2, stop)
    alive = {int(number) for _, _, number in lines(log)}
    for pid in alive:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_only_as_many_as_memory_has_room_for(log: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "LOOK", 0.02)
    names = [f"{k}-slow" for k in range(5)]
    assert train_all(runs(*names), 4, lambda name, row: None, limit=7 * GB, look=lambda pid: Held(2 * GB, 3 * GB)) == {}
    assert at_once(log) == 2  # 3 + 3 <= 7 < 3 + 3 + 3
    whats = [(what, name) for what, name, _ in lines(log)]
    assert whats.index(("epoch", "0-slow")) < whats.index(("begin", "1-slow"))  # alone until a peak is known


def test_a_run_that_needs_more_than_the_limit_runs_alone(log: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crew, "LOOK", 0.02)
    train_all(runs("a-slow", "b-slow"), 2, lambda name, row: None, limit=1.0, look=lambda pid: Held(GB, GB))
    assert at_once(log) == 1


def test_who_may_begin():
    assert has_room(None, [5 * GB] * 10, None)  # no limit
    assert has_room(GB, [], 2 * GB)  # nobody else is there
    assert not has_room(100 * GB, [GB], None)  # nobody knows how much a run needs
    assert has_room(4 * GB, [2 * GB], 2 * GB)
    assert not has_room(4 * GB - 1, [2 * GB], 2 * GB)
    assert not has_room(4 * GB - 1, [GB // 10], 2 * GB)  # it has just begun, and will need as much
    assert not has_room(5 * GB, [4 * GB], 2 * GB)  # it holds more than any was seen to
    assert not has_room(4 * GB, [2 * GB], 2 * GB, idle=1)


def test_the_memory_of_a_process_and_what_it_started():
    if not Path("/proc/self/status").is_file():
        pytest.skip("only Linux tells")
    alone = held(os.getpid())
    assert alone.peak >= alone.now > 10**7
    code = "import sys; x = bytearray(10**8); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        both = held(os.getpid())
        assert both.now >= held(child.pid).now > 10**8
        child.stdin.close()
    assert held(child.pid) == Held(0, 0)


def test_images_are_decoded_with_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    (run,) = runs("a")
    monkeypatch.setattr(crew, "cores", lambda: 12)
    assert [crew._shared(run, jobs).workers for jobs in (1, 2, 4, 16)] == [None, 6, 3, 1]
    assert crew._shared(run.replace(workers=0), 4).workers == 0


def test_cores_and_devices_are_shared_out():
    assert environment(0, 1, 8, ["0", "1"]) == {}  # one job has all
    assert environment(1, 2, 8, [])["OMP_NUM_THREADS"] == "4"
    assert environment(1, 4, 2, [])["OMP_NUM_THREADS"] == "1"
    assert [environment(slot, 3, 8, ["2", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "5", "2"]
    assert "CUDA_VISIBLE_DEVICES" not in environment(0, 2, 8, ["0"])
