"""The typed configuration and the errors: the bottom layer, which imports no other layer of kdpipe."""

from kdpipe.configs.load import dump_config, find_config, load_config, load_open_config, parse_config, shipped_configs
from kdpipe.configs.schema import Config

__all__ = ["Config", "dump_config", "find_config", "load_config", "load_open_config", "parse_config", "shipped_configs"]
