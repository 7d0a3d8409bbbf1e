import time

import pytest

from mmdiff_ray.config import ConfigError
from mmdiff_ray.tracking import queries


def test_a_run_is_found_by_id_by_name_and_by_its_folder(uri, client, experiment):
    older, newer = (
        client.create_run(experiment, start_time=n, run_name="emoji-2").info.run_id for n in (1, 2)
    )
    assert queries.find_run(uri, older).info.run_id == older
    assert queries.find_run(uri, "emoji-2").info.run_id == newer
    assert queries.find_run(uri, "/data/runs/emoji-2/").info.run_id == newer


def test_an_unknown_run_is_an_error_that_names_the_newest_but_no_trials(uri, client, experiment):
    soon = time.time_ns() // 1_000_000 + 1000
    parent = client.create_run(experiment, start_time=soon, run_name="just begun")
    tags = {"mlflow.parentRunId": parent.info.run_id}
    client.create_run(experiment, start_time=soon + 1, run_name="0007", tags=tags)
    with pytest.raises(ConfigError, match=r"no run 'nobody'.*newest: just begun"):
        queries.find_run(uri, "nobody")


def test_a_step_recorded_again_after_a_checkpoint_counts_once(uri, client, run_id):
    for time_ms, step, value in [(1, 0, 5.0), (2, 10, 4.0), (3, 20, 3.0), (4, 10, 4.5), (5, 20, 3.5)]:
        client.log_metric(run_id, "loss", value, timestamp=time_ms, step=step)
    assert queries.history(uri, run_id, "loss") == [(0, 5.0), (10, 4.5), (20, 3.5)]
