"""Detect and remove users, passwords and keys in addresses, so that they are never stored or printed."""

import re

from mmdiff_ray.config.errors import ConfigError

_USER = re.compile(
    r"\b([a-z][a-z0-9+.-]*)://"
    r"([^/?#\s'\"]*|[^/?#\s'\"\[:]*:(?!\d*(?:[^\w@%+=~-]|$))[^\s'\"]*)@",  # a key may hold a slash
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"([?&](?:[\w.-]*(?:passw(?:or)?d|secret|token|(?:access|account|api)[_-]?key)[\w.-]*|sig)=)[^&#\s'\"]+",
    re.IGNORECASE,
)
IN_STORAGE = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://"
IN_TRACKING = (
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; for a database "
    "MLFLOW_TRACKING_URI"
)


def without_passwords(text: str) -> str:
    """Remove users, passwords and keys from all addresses in a text."""
    return _OPTION.sub(r"\1***", _USER.sub(_without_user, text))


def refuse_password(uri: str, variables: str) -> None:
    """Raise ConfigError for a URI with a user, password or key. variables: environment variables to use."""
    plain = without_passwords(uri)
    if plain != uri:
        raise ConfigError(
            f"a key in a URI would be recorded with the run, and {plain} has one; set it in the environment "
            f"({variables})"
        )


def _without_user(found: re.Match[str]) -> str:
    scheme, user = found.groups()
    public = user == "anonymous" or (scheme.lower() in ("abfs", "abfss") and ":" not in user)  # a container
    return found[0] if public else f"{scheme}://"
