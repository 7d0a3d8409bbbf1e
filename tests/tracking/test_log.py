import shutil
import subprocess
import sys
import threading
from pathlib import Path

from mmdiff_ray.tracking import log as log_module
from mmdiff_ray.tracking.log import Log
from tests.faults import full_disk

TARGET = {"uri": "sqlite:////x.db", "run_id": "r"}


def numbers(log: Log, limit: int = 1_000_000) -> list[int]:
    return [record.body["step"] for record in log.read(limit)]


def append_numbers(log: Log, count: int, first: int = 0) -> Log:
    for n in range(first, first + count):
        log.append("metrics", {"values": {}, "step": n})
    return log


def filled(root: Path, count: int) -> Log:
    return append_numbers(Log(root, TARGET), count)


def test_records_come_in_order_once_for_every_process_that_opens_the_log(tmp_path):
    log = filled(tmp_path, 5)
    log.mark_sent(log.read(3))
    another = Log(tmp_path)
    assert numbers(log) == numbers(another) == [3, 4] and another.target == TARGET
    append_numbers(another, 2, first=5)
    assert numbers(log) == [3, 4, 5, 6] and log.waiting == Log(tmp_path).waiting == 4
    another.mark_sent(another.read(10))
    assert log.waiting == 0 and log.all_sent
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 7, "the log is append-only"


def test_records_after_the_log_was_removed_are_sent_all_the_same(tmp_path):
    log = filled(tmp_path, 5)
    log.mark_sent(log.read(5))
    (tmp_path / "log.jsonl").unlink()
    assert numbers(append_numbers(Log(tmp_path), 2)) == [0, 1]


def test_lines_of_several_processes_do_not_mix(tmp_path):
    program = f"""
from mmdiff_ray.tracking.log import Log
log = Log({str(tmp_path)!r})
for n in range(500):
    log.append("metrics", {{"values": {{"a": 1.0}}, "step": n}})
"""
    others = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    append_numbers(Log(tmp_path), 500)
    assert [other.wait() for other in others] == [0, 0]
    assert sorted(numbers(Log(tmp_path))) == sorted(3 * list(range(500)))


def test_one_sends_at_a_time_and_a_killed_one_stops_nobody(tmp_path):
    program = f"""
import sys
from mmdiff_ray.tracking.log import Log
with Log({str(tmp_path)!r}).sending() as ours:
    print(ours, flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    log = Log(tmp_path)
    with log.sending() as ours:
        assert not ours
    other.kill()
    other.communicate()
    with log.sending() as ours, Log(tmp_path).sending() as second:
        assert (ours, second) == (True, False)


def test_a_torn_line_invalidates_no_other(tmp_path):
    log = filled(tmp_path, 1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"id": "x", "kind": "metr')
    assert log.waiting == 1, "its process may still be writing it"
    append_numbers(log, 1, first=1)
    first, torn, last = log.read(10)
    assert (first.problem, last.problem) == ("", "") and torn.problem.startswith("unreadable line")


def test_nothing_is_lost_when_lines_are_written_while_others_are_read(tmp_path):
    log, count, pause = Log(tmp_path, TARGET), 2000, sys.getswitchinterval()
    writer = threading.Thread(target=append_numbers, args=(log, count))
    seen: list[int] = []
    sys.setswitchinterval(1e-6)  # the two take turns as often as they can
    try:
        writer.start()
        while writer.is_alive() or log.waiting:
            if records := log.read(40):
                seen += [record.body["step"] for record in records]
                log.mark_sent(records)
    finally:
        sys.setswitchinterval(pause)
    assert seen == list(range(count))


def test_a_full_disk_raises_nothing_warns_once_and_loses_nothing(tmp_path, caplog):
    log = filled(tmp_path, 3)
    size = (tmp_path / "log.jsonl").stat().st_size
    with full_disk(size + 20):
        append_numbers(log, 4, first=3)
        assert (tmp_path / "log.jsonl").stat().st_size == size, "no torn line is left"
        assert numbers(log) == list(range(7)) and log.waiting == 7
        log.mark_sent(log.read(5))
        assert numbers(log) == [5, 6], "what waits in memory is sent from there"
    append_numbers(log, 1, first=7)
    assert numbers(Log(tmp_path)) == [5, 6, 7] and log.dropped == 0
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "File too large; up to 10,000 records stay in memory" in caplog.text


def test_memory_holds_so_many_records_for_a_full_disk_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "MEMORY_RECORDS", 5)
    log = Log(tmp_path, TARGET)
    with full_disk(0):
        append_numbers(log, 8)
    assert numbers(log) == [3, 4, 5, 6, 7] and log.dropped == 3


def test_what_waits_goes_to_the_log_of_another_machine(tmp_path):
    here = filled(tmp_path / "here", 3)
    here.mark_sent(here.read(1))
    here.append("artifact", {"name": "a", "folder": ""}, lambda files: (files / "a").write_text("a"))
    assert here.move_unsent(tmp_path / "there" / "0001-a") and here.waiting == 0
    there = Log(tmp_path / "there")
    assert [record.kind for record in there.read(10)] == [
        "metrics",
        "metrics",
        "artifact",
    ]
    assert there.target == TARGET and [file.read_text() for file in there.root.glob("files/*/a")] == ["a"]
    assert not (tmp_path / "there" / "0001-a").exists()
    assert here.move_unsent(tmp_path / "there" / "0002-b") and not (tmp_path / "there" / "0002-b").exists()
    with here.sending():
        assert not here.move_unsent(tmp_path / "there" / "0003-c")


def test_records_of_the_first_release_are_taken_over_unless_their_process_lives(tmp_path):
    shutil.copytree(Path(__file__).parent / "fixtures" / "spools", tmp_path / "tracking")
    newest = max((tmp_path / "tracking").iterdir())
    program = (
        f"import fcntl, sys; f = open({str(newest / 'lock')!r}); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None and owner.stdout.readline()
    log = Log(tmp_path / "tracking")
    assert log.target["run_id"].startswith("local-") and newest.exists()
    assert log.waiting == 5 + 24 - 5, "of the second process, 5 of 24 lines were sent"
    owner.communicate()
    assert Log(tmp_path / "tracking").waiting == 24 + 2 and not newest.exists()
