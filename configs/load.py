"""Loading and checking a configuration, and writing it as YAML."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kdpipe.configs.errors import ConfigError, UnfilledConfig
from kdpipe.configs.files import open_file
from kdpipe.configs.fill_in import FILL_IN, Unfilled, places_text, unfilled_places, with_open_rows_even
from kdpipe.configs.os_errors import explained, special_text
from kdpipe.configs.schema import DEFAULT_BATCH_SIZE, Config

MAX_CONFIG_BYTES = 2**20  # a thousand times the size of a long config; PyYAML takes seconds to parse it
MAX_NODES = 100_000
MAX_SHOWN_ERRORS, MAX_ERROR_CHARACTERS = 10, 500
MAX_DEPTH, BRACKET = 100, re.compile(r"[\[\]{}]")
SURROGATE = re.compile("[\ud800-\udfff]")
SHIPPED_DIR = Path(__file__).resolve().parent


def load_config(source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """
    The checked configuration from a file, or from a shipped config such as `dubai/linknet_kd`.

    `overrides` are texts `dotted.key=value` with the value in YAML, such as `train.epochs=2` or `data.train=[a, b]`.

    Raises `ConfigError`, which names the file, the key, the value and, for an unknown key, the nearest known one.
    """
    path = find_config(source)
    return _checked(_raw_config(path, overrides), str(path))


def load_open_config(source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> tuple[Config, list[str]]:
    """
    The config, as `load_config` loads it, and the teacher classes whose rows of the class map are still `FILL_IN`.

    Those rows hold even shares of all student classes. `suggest-map` uses this to suggest them from labels.
    """
    path = find_config(source)
    raw, opened = with_open_rows_even(_raw_config(path, overrides))
    return _checked(raw, str(path)), opened


def unfilled_in(text: str, origin: str) -> dict[str, list[int]]:
    """
    The dotted keys that are still `FILL_IN` in a config's text, each with its lines; a config without any is checked.

    Raises `ConfigError` as `load_config` does.
    """
    raw = _parse_yaml(text)
    places = unfilled_places(raw)
    if not places:
        parse_config(raw, origin)
    return places


def _raw_config(path: Path, overrides: Iterable[str]) -> dict[str, Any]:
    with explained("reading the config", path, ConfigError), open_file(path) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    raw = parse_mapping(data, str(path))
    for override in overrides:
        _apply_override(raw, override)
    return raw


def parse_mapping(text: bytes | str, origin: str) -> dict[str, Any]:
    """
    The plain values of a config's text, not yet checked and none of it executed; bytes are UTF-8.

    Raises `ConfigError` that names `origin` where the text is no YAML, is too large for a config, or is no mapping.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{origin} has more than {MAX_CONFIG_BYTES} bytes, far more than any config: is this the right file?"
        )
    try:
        raw = _parse_yaml(text.decode() if isinstance(text, bytes) else text)
    except ValueError as err:
        raise ConfigError(f"{origin} is not readable YAML: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin} should hold a mapping of sections, found {type(raw).__name__}")
    return raw


def _checked(raw: dict[str, Any], origin: str) -> Config:
    places = unfilled_places(raw)
    if places:
        raise UnfilledConfig(
            f"{origin} is not filled in yet: {places_text(places)}. Replace each {FILL_IN} by your own value; the comments "
            "beside them say what is needed"
        )
    return parse_config(raw, origin)


def parse_config(raw: Mapping[str, Any], origin: str) -> Config:
    """The checked configuration from a plain mapping; errors name `origin` as its source."""
    try:
        return Config.model_validate(raw)
    except ValidationError as err:
        errors = err.errors(include_url=False)
        rest = f"; and {len(errors) - MAX_SHOWN_ERRORS} more" if len(errors) > MAX_SHOWN_ERRORS else ""
        shown = "; ".join(_cut(_explain(error)) for error in errors[:MAX_SHOWN_ERRORS])
        raise ConfigError(f"{origin}: {shown}{rest}") from err
    except RecursionError as err:
        raise ConfigError(f"{origin} is nested too deeply") from err


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def find_config(source: str | os.PathLike[str]) -> Path:
    """The path of the file that `-c SOURCE` means: a file, or a shipped config by name, with or without `.yaml`."""
    source = os.fspath(source)
    path = Path(source)
    with explained("looking for the config", path, ConfigError):
        if path.is_file():
            return path
    shipped = SHIPPED_DIR / path.with_name(path.name.removesuffix(".yaml") + ".yaml") if path.name else path
    if not path.is_absolute() and ".." not in path.parts and shipped.is_file():
        return shipped
    names = shipped_configs()
    near = difflib.get_close_matches(str(source), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped configs: {', '.join(names)}"
    raise ConfigError(
        f"no config at {path.absolute()}{special_text(path)}, and no shipped config is called {source}; {hint}"
    )


def shipped_configs() -> list[str]:
    """The names of the configs that come with kdpipe, for `-c`."""
    return sorted(str(path.relative_to(SHIPPED_DIR).with_suffix("")) for path in SHIPPED_DIR.rglob("*.yaml"))


def _parse_yaml(text: str) -> Any:
    """Plain values of a YAML text, none of it executed; raises `ValueError` for any fault in it."""
    depth = 0
    for bracket in BRACKET.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:  # PyYAML's time grows with the square of it
            raise ValueError("it is nested too deeply")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as err:
        raise ValueError(str(err)) from err
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err
    # PyYAML raises these for a tag that does not fit its value.
    except (LookupError, TypeError, AttributeError, OverflowError) as err:
        raise ValueError(f"a value does not fit its tag ({err!r:.100})") from err


class _Loader(yaml.SafeLoader):
    """
    Safe YAML that records the lines of `FILL_IN`.

    It refuses a repeated key, which YAML forbids and PyYAML accepts; NUL characters, which no path or name may contain; and
    aliases that expand to more than a config can hold ("billion laughs"). A character beyond 16 bits may be written as two escapes, as
    JSON does.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _expanded_nodes(node, {}) > MAX_NODES:
            raise yaml.YAMLError(f"with its aliases expanded it has more than {MAX_NODES} values")
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise yaml.YAMLError(f"a NUL character{node.start_mark}")
        if isinstance(node, yaml.ScalarNode) and node.value == FILL_IN:
            return Unfilled(node.start_mark.line + 1)
        value = super().construct_scalar(node)
        if isinstance(value, str) and SURROGATE.search(value):
            try:
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError as err:
                raise yaml.YAMLError(
                    f"half of a character (an escape \\ud800 to \\udfff without its pair){node.start_mark}"
                ) from err
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`, whose keys may be given again
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.YAMLError(f"the key {key!r} occurs twice{key_node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _expanded_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node with every alias expanded; `known` holds the nodes counted before."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES  # while it is counted, as a node within itself has no end
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else [item])]
        nested = not isinstance(node, yaml.ScalarNode)
        known[id(node)] = min(1 + (sum(_expanded_nodes(part, known) for part in parts) if nested else 0), MAX_NODES + 1)
    return known[id(node)]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set needs KEY=VALUE, such as train.epochs=2, found {override!r}")
    try:
        value = _parse_yaml(text)
    except ValueError as err:
        raise ConfigError(f"--set {key}: {text!r} is not YAML: {err}") from err
    *parents, last = key.strip().split(".")
    section: Any = raw
    for parent in parents:
        section = section[_place(section, parent, key)] if isinstance(section, list) else section.setdefault(parent, {})
        if not isinstance(section, dict | list):
            raise ConfigError(f"--set {key}: {parent} is a value, not a section")
    if key.strip() == "train.batch_size" and value == "auto" and isinstance(section, dict):
        _keep_effective_size(section)
    section[_place(section, last, key) if isinstance(section, list) else last] = value


def _place(listed: list[Any], part: str, key: str) -> int:
    """The index that a part of a dotted key means, as in `teachers.0.tta`."""
    if not part.isdigit() or int(part) >= len(listed):
        raise ConfigError(f"--set {key}: {part} is not an index of a list of {len(listed)}; indices are counted from 0")
    return int(part)


def _keep_effective_size(train: dict[str, Any]) -> None:
    """Keep the file's samples per step as `effective_batch_size`, since `--set train.batch_size=auto` replaces the batch size."""
    sizes = train.get("batch_size", DEFAULT_BATCH_SIZE), train.get("accumulate", 1)
    if all(isinstance(size, int) for size in sizes) and train.get("effective_batch_size") is None:
        train["effective_batch_size"] = sizes[0] * sizes[1]
        train.pop("accumulate", None)


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"the key {key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if location else message
    return f"{key}: {message}, found {reprlib.repr(error['input'])}"


def _cut(text: str) -> str:
    """A text without what exceeds `MAX_ERROR_CHARACTERS`, such as a name of thousands."""
    return text if len(text) <= MAX_ERROR_CHARACTERS else f"{text[: MAX_ERROR_CHARACTERS - 1]}…"


def _known_keys(location: list[str]) -> list[str]:
    model: type[BaseModel] | None = Config
    for part in location:
        if part.isdigit():  # an index in a list of sections
            continue
        if model is None or part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return list(model.model_fields) if model else []
