"""Put shipped configs, experiments and sweeps into a wheel. Editable installs read them in the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("pipelines/configs", "sweeps")


class ShippedFiles(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] |= {folder: f"mmdiff_ray/shipped/{folder}" for folder in SHIPPED}
