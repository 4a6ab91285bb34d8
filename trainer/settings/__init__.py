"""What a run is told: TOML sections, the model's sizes, the parallel degrees. No torch in here."""

from .run import RunConfig, load_config

__all__ = ["RunConfig", "load_config"]
