"""Open MLflow's page on the runs of a store."""

import subprocess
import sys
from pathlib import Path

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking.store import SQLITE, client, sqlite_file, tracking_uri


def serve(runs: str | Path, host: str, port: int) -> int:
    """Serve MLflow's page until interrupted; return its exit code. Raises ConfigError where there is
    nothing yet."""
    uri = tracking_uri(None, Path(runs).absolute())
    if not uri.startswith(SQLITE):
        print(f"the runs are on a server: open {uri}")
        return 0
    if not sqlite_file(uri).is_file():
        raise ConfigError(f"no runs in {runs}/ yet; make some with: mmdiff train pipelines/configs/demo.yaml")
    client(uri)  # brings an older database up to date before a server with several workers opens it
    print(f"MLflow: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host]
    try:
        return subprocess.call([*command, "--port", str(port), "--workers", "1"])
    except KeyboardInterrupt:
        return 0
