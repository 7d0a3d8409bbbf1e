"""A real S3 server on loopback."""

import contextlib
import json
import logging
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.surroundings import is_somebodys

SECRET = "a-very-long-secret"
"""The key of a server that `s3_server` starts."""
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

    def deny(self, path: str) -> None:
        """Refuse every write of an object whose path matches."""
        _client(self.port).put_bucket_policy(
            Bucket="toys",
            Policy=json.dumps(
                {
                    "Version": "2012-10-17",
                    "Statement": [
                        {
                            "Effect": "Deny",
                            "Principal": "*",
                            "Action": "s3:PutObject",
                            "Resource": f"arn:aws:s3:::toys/{path}",
                        }
                    ],
                }
            ),
        )

    def allow_all(self) -> None:
        """Lift what `deny` refused."""
        _client(self.port).delete_bucket_policy(Bucket="toys")

    def _tell(self, what: str, data: bytes = b"") -> None:
        address, plain = f"http://127.0.0.1:{self.port}/moto-api/{what}", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(address, data, plain, method="POST")).close()


def _client(port: int) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")


@contextlib.contextmanager
def _running() -> Iterator[int]:
    """Run an empty server; yield its port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    Bucket(port)._tell("reset")  # all servers of a process share what they hold
    try:
        yield port
    finally:
        server.stop()


@contextlib.contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run an empty server, with its keys in an environment that has no others; yield its host and port."""
    for name in list(os.environ):
        if is_somebodys(name):
            patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", "testing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with _running() as port:
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """Serve S3 for the block, with an empty bucket `toys`. The environment must hold `KEYS`."""
    with _running() as port:
        bucket = Bucket(port)
        try:
            _client(port).create_bucket(Bucket="toys")
            yield bucket
        finally:
            bucket._tell("reset-auth", b"inf")
