"""Hostile config files are refused with `ConfigError`, in bounded time and memory."""

from pathlib import Path

import psutil
import pytest
import yaml
from helpers.mutations import fuzzed, mutated, spliced
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.configs import Config, load_config, parse_config
from kdpipe.configs.errors import ConfigError

DEMO_FILE = Path(__file__).parents[2] / "configs/demo.yaml"
DEMO = yaml.safe_load(DEMO_FILE.read_text())


@fuzzed
@given(mutated(DEMO))
def test_a_config_is_a_config_or_refused(content):
    try:
        assert isinstance(parse_config(content, "test"), Config)
    except ConfigError as err:
        assert len(str(err)) < 6000


YAML_BITS = ["!!python/object/apply:os.system [ls]", "!!int x", "!!bool x", "!!float []", "!!set {a}", "!!binary x", "&a", "*a",
             "<<: *a", "? [a]", "2024-13-45", "!!timestamp 1", "9" * 5000, "[" * 3000, "{" * 3000, "\x00", '"\\0"', "!!map x", "!!int ''",
             "- " * 2000, "|\n", "%YAML 9.9", "---", "!<!>"]  # fmt: skip


@fuzzed
@given(
    st.one_of(
        spliced(DEMO_FILE.read_bytes()),
        st.lists(st.one_of(st.sampled_from(YAML_BITS), st.sampled_from(list(DEMO)), st.sampled_from([": ", "\n", "  "])), max_size=8)
        .map(lambda parts: "".join(parts).encode()),
    )
)  # fmt: skip
def test_no_text_escapes_the_config_loader(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(load_config(path), Config)
    except ConfigError as err:
        assert len(str(err)) < 6000


LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "with its aliases expanded it has more than 100000 values"),
        ("name: &x [*x]", "with its aliases expanded it has more than 100000 values"),
        ("name: " + "[" * 20_000, "nested too deep"),
        ("name: " + "9" * 5000, "Exceeds the limit"),
        ("name: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("name: !!bool maybe", r"a value does not fit its tag \(KeyError\('maybe'\)\)"),
        ("name: 2024-13-45", "month must be in 1..12"),
        ('name: "a\\0b"', "a NUL character"),
        ("#" * 2**20 + "\nname: x", r"has more than 1048576 bytes, far more than any config"),
    ],
)
def test_yaml_that_harms_is_refused(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")
    assert psutil.Process().memory_info().rss - before < 200e6


def test_aliases_that_stand_for_little_are_read(tmp_path):
    text = DEMO_FILE.read_text()
    (tmp_path / "c.yaml").write_text(text.replace("Road: {Settlement: 1}", "Road: &built {Settlement: 1}").replace(
        "Developed: {Settlement: 1}", "Developed: {Settlement: 1}"))  # fmt: skip
    assert load_config(tmp_path / "c.yaml") == load_config("demo")


def test_a_thousand_mistakes_are_told_in_a_few_lines():
    with pytest.raises(ConfigError, match=r"; and \d+ more$") as caught:
        parse_config({**DEMO, **{f"key{i}": "x" * 10_000 for i in range(1000)}, "seed": "y" * 10_000}, "test")
    assert len(str(caught.value)) < 6000
