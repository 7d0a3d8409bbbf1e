"""What tests must not find around them."""

import re


def is_somebodys(variable: str) -> bool:
    """Return whether an environment variable says where somebody's cluster, store or bucket is, or opens it.

    Ray's inner settings, whose names go on in small letters, are the tests' own.
    """
    return re.match("RAY_[A-Z]|MLFLOW_|AWS_", variable) is not None
