"""`options` of teacher and student: plain YAML values, never what kdpipe passes itself, and absent where there are none."""

import pytest
import yaml

from kdpipe.configs import dump_config, load_config, parse_config
from kdpipe.configs.errors import ConfigError

SHIPPED = "biodiversity/unetformer_kd"


def with_options(key, text):
    return load_config(SHIPPED, [f"{key}.options={text}"])


def test_options_are_plain_values_of_yaml_and_come_back():
    text = (
        "{encoder_output_stride: 8, decoder_atrous_rates: [6, 12, 18], decoder_use_norm: {type: batchnorm, eps: 0.001}}"
    )
    config = with_options("teacher", text)
    assert config.teacher.options == yaml.safe_load(text)
    assert parse_config(yaml.safe_load(dump_config(config)), origin="its dump") == config
    assert load_config(SHIPPED, ["student.options.width=32"]).student.options == {"width": 32}


def test_a_configuration_without_options_is_written_as_before():
    raw = yaml.safe_load(dump_config(load_config(SHIPPED)))
    assert "options" not in raw["teacher"]
    assert "options" not in raw["student"]


@pytest.mark.parametrize(
    ("key", "name", "instead"),
    [
        ("teacher", "encoder_name", "set teacher.encoder instead"),
        ("teacher", "encoder_weights", "set teacher.checkpoint instead"),
        ("teacher", "classes", "set teacher.classes instead"),
        ("teacher", "in_channels", "set teacher.bands instead"),
        ("teacher", "activation", "leave it out: kdpipe needs one logit for each class and pixel, and nothing else"),
        ("teacher", "aux_params", "leave it out"),
        ("student", "encoder", "set student.encoder instead"),
        ("student", "encoder_weights", "set student.encoder_weights instead"),
        ("student", "weights", "set student.checkpoint instead"),
        ("student", "num_classes", "set classes.names instead"),
    ],
)
def test_what_kdpipe_passes_itself_is_refused_with_the_key_to_use(key, name, instead):
    with pytest.raises(ConfigError, match=rf"{key}\.options: {name} is not an option: {instead}"):
        with_options(key, f"{{{name}: 3}}")


@pytest.mark.parametrize("text", ["{width: 2020-01-01}", "{width: .nan}", "{8: 1}", "[width]"])
def test_options_that_are_no_plain_mapping_are_refused(text):
    with pytest.raises(ConfigError, match=r"student\.options"):
        with_options("student", text)
