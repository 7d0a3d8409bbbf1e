"""Faults of a machine: a proxy that makes the network slow, cut or dead, and a disk that is full."""

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

CHUNK_BYTES = 1 << 14
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Faults:
    """What is wrong with the network now; to be changed at any time while the proxy runs.

    down: connections are ended at once, those that are open too. delay_s: before every chunk to the server.
    fail_next: so many of the next connections are answered with HTTP 503. cut_after: connections end in the
    middle, when the client has sent so many bytes (a half-written upload). held: nothing is passed on to the
    server until it ends. lose_answer: the answer to the next request with these bytes never arrives.
    """

    port: int = 0
    down: bool = False
    delay_s: float = 0.0
    fail_next: int = 0
    cut_after: int | None = None
    held: bool = False
    lose_answer: bytes | None = None
    connections: int = 0
    cut: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _loses_answer(self, chunk: bytes) -> bool:
        with self._lock:
            losing = self.lose_answer is not None and self.lose_answer in chunk
            self.lose_answer = None if losing else self.lose_answer
            return losing

    def _takes_failure(self) -> bool:
        with self._lock:
            self.connections += 1
            failing = self.fail_next > 0
            self.fail_next -= failing
            return failing


@contextlib.contextmanager
def faulty(server_port: int) -> Iterator[Faults]:
    """Proxy a server on loopback for the block; without faults until the caller sets them."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    faults, ended = Faults(port=listener.getsockname()[1]), threading.Event()

    def listen() -> None:
        while not ended.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve, args=(client, server_port, faults), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield faults
    finally:
        ended.set()
        faults.down = True
        listener.close()


def _serve(client: socket.socket, server_port: int, faults: Faults) -> None:
    with client:
        if faults.down:
            return
        if faults._takes_failure():
            with contextlib.suppress(OSError):
                client.recv(CHUNK_BYTES)
                client.sendall(UNAVAILABLE)
            return
        try:
            server = socket.create_connection(("127.0.0.1", server_port), timeout=10)
        except OSError:
            return
        with server:
            mute = threading.Event()
            back = threading.Thread(target=_copy, args=(server, client, faults, False, mute), daemon=True)
            back.start()
            _copy(client, server, faults, True, mute)
            back.join()


def _copy(
    source: socket.socket, target: socket.socket, faults: Faults, upload: bool, mute: threading.Event
) -> None:
    """Copy until an end or a fault; then end both, so that the other direction ends too. mute: set where the
    next answer shall be lost."""
    sent = 0
    source.settimeout(0.2)
    try:
        while not faults.down:
            try:
                chunk = source.recv(CHUNK_BYTES)
            except TimeoutError:
                continue
            if not chunk:
                break
            if upload and faults.delay_s:
                time.sleep(faults.delay_s)
            while upload and faults.held and not faults.down:
                time.sleep(0.02)
            if upload and faults._loses_answer(chunk):
                mute.set()
            if not upload and mute.is_set():
                break
            if upload and faults.cut_after is not None and sent + len(chunk) > faults.cut_after:
                target.sendall(chunk[: max(0, faults.cut_after - sent)])
                faults.cut += 1
                break
            target.sendall(chunk)
            sent += len(chunk)
    except OSError:
        pass
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def full_disk(byte: int) -> Iterator[None]:
    """Let this process write no file beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
