"""A config that contains FILL_IN is refused, and the error names keys and lines."""

import pytest
import yaml

from kdpipe.configs import dump_config, load_config
from kdpipe.configs.errors import ConfigError, UnfilledConfig
from kdpipe.configs.fill_in import places_text
from kdpipe.configs.load import load_open_config

CLASSES = ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]


@pytest.fixture
def write(tmp_path):
    """A function that writes the demo's config with other values and returns its path."""

    def config(**sections):
        raw = yaml.safe_load(dump_config(load_config("demo")))
        for name, value in sections.items():
            raw[name] = {**raw[name], **value} if isinstance(value, dict) else value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False, width=10**6))
        return path

    return config


def lines_of(path):
    return [number for number, line in enumerate(path.read_text().splitlines(), start=1) if "FILL_IN" in line]


def test_keys_and_lines_are_named(write):
    path = write(
        teacher={"classes": ["FILL_IN"] * 8, "normalize": "FILL_IN"}, class_map={"Road": "FILL_IN", "Water": "FILL_IN"}
    )
    lines = lines_of(path)
    assert len(lines) == 11
    with pytest.raises(UnfilledConfig) as refused:
        load_config(path)
    text = str(refused.value)
    assert (
        f"{path} is not filled in yet: teacher.classes (lines {lines[0]} to {lines[7]}), teacher.normalize (line {lines[8]})"
        in text
    )
    assert f"class_map (lines {lines[9]}, {lines[10]})" in text
    assert isinstance(refused.value, ConfigError)


def test_a_value_on_the_command_line_replaces_it(write):
    path = write(cache={"path": "FILL_IN"})
    with pytest.raises(UnfilledConfig, match=r"cache.path \(line "):
        load_config(path, ["train.epochs=2"])
    assert load_config(path, ["cache.path=here.zarr"]).cache.path == "here.zarr"


@pytest.mark.parametrize(
    "value", ["FILL_IN", "'FILL_IN'", '"FILL_IN"', "[FILL_IN, x]", "{FILL_IN: 1}", "{a: {b: [FILL_IN]}}"]
)
def test_every_spelling_of_it_is_found(tmp_path, value):
    (tmp_path / "mine.yaml").write_text(f"name: x\nclass_map: {value}\n")
    with pytest.raises(UnfilledConfig, match=r"class_map \(line 2\)"):
        load_config(tmp_path / "mine.yaml")


def test_spans_of_lines_are_joined():
    assert places_text({"a.b": [3], "class_map.x": [9], "class_map.y": [7, 8], "c": [4, 4, 6]}) == (
        "a.b (line 3), class_map (lines 7 to 9), c (lines 4, 6)"
    )


def test_open_rows_are_even_and_named(write):
    path = write(class_map={"Road": "FILL_IN"})
    config, opened = load_open_config(path)
    assert opened == ["Road"]
    assert config.class_map["Road"] == dict.fromkeys(CLASSES, 1 / 6)
    assert config.class_map["Tree"] == {"Forest": 1}
    assert load_open_config("demo") == (load_config("demo"), [])


def test_an_open_map_has_a_row_for_each_channel_that_is_kept(write):
    path = write(class_map="FILL_IN", teacher={"drop_channels": [7]})
    config, opened = load_open_config(path)
    assert opened == list(config.class_map) == config.teacher_classes
    assert "Background" not in opened


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"class_map": "FILL_IN", "teacher": {"classes": "FILL_IN"}}, r"teacher.classes \("),
        ({"class_map": "FILL_IN", "classes": {"names": ["FILL_IN"] * 6}}, r"classes.names \("),
        ({"class_map": "FILL_IN", "teacher": "none"}, r"class_map \("),
    ],
)
def test_other_unfilled_keys_are_refused_beside_an_open_map(write, sections, key):
    with pytest.raises(UnfilledConfig, match=key):
        load_open_config(write(**sections))
