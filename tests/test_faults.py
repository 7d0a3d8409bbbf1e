"""The faulty network of the tests does what it says: else tests through it could not fail."""

import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import ClassVar

import pytest

from tests.faults import Faults, faulty


class _Echo(http.server.BaseHTTPRequestHandler):
    seen: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def faults() -> Iterator[Faults]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with faulty(server.server_address[1]) as faults:
        yield faults
    server.shutdown()


def _post(faults: Faults, body: bytes) -> bytes:
    with urllib.request.urlopen(faults.url, data=body, timeout=5) as answer:
        return answer.read()


def test_a_sound_network_changes_nothing(faults: Faults) -> None:
    body = bytes(range(256)) * 4000
    assert _post(faults, body) == body
    assert faults.connections == 1


def test_a_dead_network_answers_nothing_until_it_is_up_again(faults: Faults) -> None:
    faults.down = True
    with pytest.raises(OSError):
        _post(faults, b"x")
    faults.down = False
    assert _post(faults, b"x") == b"x"


def test_so_many_requests_fail_and_then_no_more(faults: Faults) -> None:
    faults.fail_next = 2
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            _post(faults, b"x")
    assert _post(faults, b"x") == b"x"


def test_an_upload_is_cut_in_the_middle(faults: Faults) -> None:
    faults.cut_after = 50_000
    with pytest.raises(OSError):
        _post(faults, b"x" * 200_000)
    assert faults.cut == 1
    assert _post(faults, b"x" * 1000) == b"x" * 1000


def test_an_answer_is_lost_though_the_server_did_what_was_asked(faults: Faults) -> None:
    faults.lose_answer = b"POST"
    with pytest.raises(OSError):
        _post(faults, b"x")
    assert _post(faults, b"y") == b"y"
    assert _Echo.seen[-2:] == [b"x", b"y"]


def test_a_held_network_passes_nothing_on_until_it_is_let_go(faults: Faults) -> None:
    faults.held = True
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(_post(faults, b"held")))
    asking.start()
    asking.join(0.3)
    assert answers == [] and b"held" not in _Echo.seen
    faults.held = False
    asking.join(5)
    assert answers == [b"held"]


def test_a_slow_network_is_slow(faults: Faults) -> None:
    faults.delay_s = 0.2
    begun = time.perf_counter()
    assert _post(faults, b"x") == b"x"
    assert time.perf_counter() - begun > 0.2
