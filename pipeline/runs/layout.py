"""Names of what a training run writes: `model_weights/<group>/<name>/` for its results, `lightning_logs/<group>/<name>/` for its logs."""

from __future__ import annotations

from pathlib import Path

from kdpipe.configs.outputs import output_path
from kdpipe.configs.schema import Config

WEIGHTS_DIR, LOGS_DIR = Path("model_weights"), Path("lightning_logs")  # as the guide lays them out
LAST, BEST = "last.ckpt", "best.ckpt"
RUN, CONFIG = "run.json", "config.yaml"
TILES = "tiles.jsonl.gz"  # what the run was trained and validated on (see `trained_on`)
METRICS = "metrics.csv"  # in a folder `version_N` of the logs, one for each start of the run


def weights_folder(config: Config) -> Path:
    """The folder of a run's results, absolute; `ConfigError` where it lies in a Python package."""
    return output_path(WEIGHTS_DIR / config.group / config.name, key="model_weights")


def logs_folder(weights: Path, config: Config) -> Path:
    """The folder of a run's logs, which lies beside its results."""
    return (weights / "../../..").resolve() / LOGS_DIR / config.group / config.name


def run_folder(path: str | Path) -> Path:
    """The folder of a run that is named by its folder or by its `run.json`."""
    return Path(path) if Path(path).is_dir() else Path(path).parent
