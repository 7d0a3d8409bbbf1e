import json
import subprocess
import sys
import threading
import time

import pytest

from mmdiff_ray.tracking import spool as spool_module
from mmdiff_ray.tracking.spool import Spool, left_in, waiting

TARGET = {"uri": "sqlite:////x.db", "run_id": "r"}


def numbers(entries) -> list[int | None]:
    return [entry.record.body["n"] if entry.record else None for entry in entries]


def filled(root, count: int) -> Spool:
    spool = Spool.create(root, TARGET)
    append_numbers(spool, count)
    return spool


def adopted_by_another(spool: Spool) -> Spool:
    adopted = Spool.adopt(spool.folder)
    assert adopted is not None
    return adopted


def append_numbers(spool: Spool, count: int) -> None:
    for n in range(count):
        spool.append("metrics", {"n": n})


def test_what_is_left_is_counted_also_where_a_thread_here_still_holds_it(tmp_path):
    held, given_up = filled(tmp_path, 5), filled(tmp_path, 3)
    held.acknowledge(held.read(1))
    given_up.close()
    assert left_in(tmp_path) == 4 + 3
    program = f"""
from mmdiff_ray.tracking.spool import left_in
print(left_in({str(tmp_path)!r}))
"""
    counted = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert counted.stdout == "3\n", "another process will send the others"


def test_records_come_back_in_order_and_once_acknowledged_no_more(tmp_path):
    spool = filled(tmp_path, 5)
    first = spool.read(3)
    assert numbers(first) == [0, 1, 2] and len(spool) == 5
    spool.acknowledge(first)
    assert numbers(spool.read(10)) == [3, 4] and len(spool) == 2


def test_a_half_written_line_was_never_recorded(tmp_path):
    spool = filled(tmp_path, 2)
    with open(spool.folder / "00000.jsonl", "a") as file:
        file.write('{"id": "x", "kind": "metr')
    spool.close()
    adopted = adopted_by_another(spool)
    assert numbers(adopted.read(10)) == [0, 1] and len(adopted) == 2


def test_an_unreadable_line_takes_no_other_with_it(tmp_path):
    spool = filled(tmp_path, 1)
    with open(spool.folder / "00000.jsonl", "a") as file:
        file.write("\x00\x00 torn\n")
    spool.append("metrics", {"n": 1})
    assert numbers(spool.read(10)) == [0, None, 1]


def test_a_living_owner_keeps_its_spool_and_an_ended_one_leaves_it(tmp_path):
    spool = filled(tmp_path, 3)
    assert waiting(tmp_path) == [spool.folder]
    assert Spool.adopt(spool.folder) is None
    spool.close()
    adopted = adopted_by_another(spool)
    assert numbers(adopted.read(10)) == [0, 1, 2] and adopted.target == TARGET


def test_an_adopted_spool_goes_on_where_its_owner_stopped(tmp_path):
    spool = filled(tmp_path, 4)
    spool.acknowledge(spool.read(3))
    spool.close()
    assert numbers(adopted_by_another(spool).read(10)) == [3]


def test_a_torn_note_of_what_was_sent_sends_what_is_there_again(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 1)
    spool = filled(tmp_path, 4)
    spool.acknowledge(spool.read(3))
    (spool.folder / "sent.json").write_text("")
    spool.close()
    assert numbers(adopted_by_another(spool).read(10)) == [2, 3]


def test_an_empty_spool_leaves_nothing_behind(tmp_path):
    spool = filled(tmp_path, 1)
    spool.acknowledge(spool.read(1))
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_a_record_go_when_it_has_arrived(tmp_path):
    spool = Spool.create(tmp_path, TARGET)
    spool.files("one").mkdir()
    spool.append("artifact", {"n": 0}, record_id="one")
    spool.acknowledge(spool.read(1))
    assert not spool.files("one").exists()


def test_nothing_is_lost_when_lines_are_written_while_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 300)
    spool, count, pause = Spool.create(tmp_path, TARGET), 3000, sys.getswitchinterval()
    writer = threading.Thread(target=append_numbers, args=(spool, count))
    seen: list[int | None] = []
    sys.setswitchinterval(1e-6)  # the two take turns as often as they can
    try:
        writer.start()
        while writer.is_alive() or len(spool):
            if entries := spool.read(7):
                seen += numbers(entries)
                spool.acknowledge(entries)
            elif not writer.is_alive():
                break
    finally:
        sys.setswitchinterval(pause)
    assert seen == list(range(count))
    assert len(list(spool.folder.glob("*.jsonl"))) == 1


def test_writing_a_record_takes_less_than_a_millisecond(tmp_path):
    spool, times = Spool.create(tmp_path, TARGET), []
    body = {"values": {f"loss/l1/instance{n}": 0.1 * n for n in range(30)}, "step": 1}
    for _ in range(500):
        start = time.perf_counter()
        spool.append("metrics", body)
        times.append(time.perf_counter() - start)
    assert sorted(times)[250] < 1e-3


def test_a_value_that_json_cannot_hold_is_an_error_of_the_writer(tmp_path):
    with pytest.raises(ValueError):
        Spool.create(tmp_path, TARGET).append("metrics", {"n": float("nan")})


def test_refused_records_are_kept_with_the_reason(tmp_path):
    spool = filled(tmp_path, 1)
    record = spool.read(1)[0].record
    assert record is not None
    spool.refuse(record, "too long")
    line = json.loads((tmp_path / "refused.jsonl").read_text())
    assert line["reason"] == "too long" and line["body"] == {"n": 0}
