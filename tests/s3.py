"""A real S3 server on loopback, for the block, with an empty bucket `toys`."""

import contextlib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@dataclass(frozen=True)
class Bucket:
    """Where the bucket is. port: of the server, or of a proxy before it."""

    port: int

    def uri(self, path: str, port: int | None = None) -> str:
        """Return the URI of something in the bucket."""
        where = f"127.0.0.1:{port or self.port}"
        return f"s3://toys/{path}?scheme=http&region=us-east-1&endpoint_override={where}"

    def ask_for_rights(self) -> None:
        """Let the server refuse everyone from now on whom it has given no right: all."""
        self._tell("reset-auth", b"0")

    def _tell(self, what: str, data: bytes = b"") -> None:
        address, plain = f"http://127.0.0.1:{self.port}/moto-api/{what}", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, data, plain, method="POST")).close()


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """Serve S3 for the block. The environment must hold `KEYS`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    bucket = Bucket(port)
    try:
        bucket._tell("reset")  # all servers of a process share what they hold
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="toys")
        yield bucket
    finally:
        bucket._tell("reset-auth", b"inf")
        server.stop()
