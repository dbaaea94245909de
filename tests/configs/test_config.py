"""The configuration is closed: unknown keys are refused, and wrong values are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from kdpipe.configs import Config, dump_config, load_config, parse_config, shipped_configs
from kdpipe.configs import schema as sections
from kdpipe.configs.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_load_and_survive_a_round_trip(name, tmp_path):
    config = load_config(name)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", r"unknown key train\.epoch; did you mean train\.epochs\?"),
        ("distil.alpha=1", r"unknown key distil; did you mean distill\?"),
        ("cache.zzz=1", r"unknown key cache\.zzz; known here: path, kind, bits"),
        ("train.epochs=0", r"train\.epochs: .*greater than or equal to 1, found 0"),
        ("distill.alpha=1.5", r"distill\.alpha: .* found 1\.5"),
        ("cache.bits=9", r"cache\.bits: .* found 9"),
        (
            "cache={path: c, kind: logits, bits: 6}",
            r"cache: bits is 6, but logits are stored with 8 or 16: set one of these, or kind: soft",
        ),
        ("class_map.Tree={Forest: 0.5}", r"class_map\.Tree must sum to 1, found 0\.5"),
        ("class_map.Tree={Woods: 1}", r"class_map\.Tree names \['Woods'\], not among classes\.names"),
        ("class_map.Tree={Forest: 1.5, Grassland: -0.5}", r"class_map\.Tree has a negative share"),
        ("class_map.Lava={Forest: 1}", r"missing \[\], unknown \['Lava'\]"),
        ("teacher.classes=[Tree, Tree]", r"teacher\.classes names \['Tree'\] more than once"),
        ("teacher.drop_channels=[8]", r"drop_channels are places in classes counted from 0, found \[8\] with 8"),
        ("teacher.drop_channels=[1, 1]", r"teacher\.drop_channels names \[1\] more than once"),
        ("teacher.drop_channels=[0, 1, 2, 3, 4, 5, 6]", r"leaves fewer than two of classes"),
        ("teacher.drop_channels=[0]", r"class_map needs one row .* missing \[\], unknown \['Tree'\]"),
        ("student.num_classes=7", r"student\.num_classes is 7, but classes\.names has 6"),
        (
            "student.num_classes=8",
            r"leave it out\. The student predicts classes\.names; class_map maps the teacher's 8 classes",
        ),
        ("student.checkpoint=demo_output/teacher.pth", r"student\.checkpoint is teacher\.checkpoint .* leave it out"),
        ("train.batch_size=0", r"train\.batch_size: expected a whole number from 1 up, or auto, found 0$"),
        ("train.batch_size=big", r"train\.batch_size: expected a whole number from 1 up, or auto, found 'big'$"),
        (
            "train.effective_batch_size=6",
            r"effective_batch_size is 6, but batch_size 8 x accumulate 1 is 8: leave it out",
        ),
        ("classes.ignore_index=3", r"ignore_index 3 is also the index of class Cropland"),
        ("classes.not_scored=[Sea]", r"not_scored names \['Sea'\]"),
        ("data.stretch={percentiles: [98, 2]}", r"percentiles need 0 <= low < high"),
        ("data.stretch={range: [5, 5]}", r"a range needs low < high"),
        ("data.bands=[0, 1, 2]", r"bands are counted from 1"),
        ("name=../../etc", r"name: .*pattern"),
        ("train", r"--set needs KEY=VALUE"),
        ("seed.a=1", r"seed is a value, not a section"),
        ("train.epochs=[", r"is not YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("demo", [override])


def several(**second):
    raw = load_config("demo").model_dump(mode="json")
    teacher = raw.pop("teacher")
    return {**raw, "teachers": [teacher, {**teacher, **second}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": []}, "one teacher goes under the key teacher, several under teachers; found both or neither"),
        ({"teacher": several()["teachers"][0]}, "found both or neither"),
        (
            several(classes=["Sea", *several()["teachers"][0]["classes"][1:]]),
            r"teachers\.1 must predict the same classes .* 'Sea'",
        ),
        (several(drop_channels=[0]), r"teachers\.1 must predict the same classes as the first teacher, in any order"),
        (several(weight=0), r"teachers\.1\.weight: .* greater than or equal to 0.000001, found 0"),
        (several(weight=1e308), r"teachers\.1\.weight: .* less than or equal to 1000000, found 1e\+308"),
        (several(tat="d4"), r"unknown key teachers\.1\.tat; did you mean teachers\.1\.tta\?"),
    ],
)
def test_mistakes_in_several_teachers_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({**several(), **change}, "test")


@pytest.mark.parametrize(("temperature", "bound"), [(1e-320, "0.01"), (1e-38, "0.01"), (0, "0.01"), (1e20, "100")])
def test_temperatures_that_float32_cannot_divide_by_are_refused(temperature, bound):
    with pytest.raises(ConfigError, match=rf"distill\.temperature: .* or equal to {bound}, found"):
        load_config("demo", [f"distill.temperature={temperature!r}"])


def test_a_single_teacher_has_no_weight():
    with pytest.raises(ConfigError, match=r"teacher\.weight is for several teachers \(teachers: \[\.\.\.\]\), found 2"):
        load_config("demo", ["teacher.weight=2"])


def test_several_teachers_survive_a_round_trip_and_overrides_reach_each(tmp_path):
    config = parse_config(several(weight=2, classes=several()["teachers"][0]["classes"][::-1]), "test")
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config
    changed = load_config(tmp_path / "c.yaml", ["teachers.1.tta=d4"])
    assert [member.tta for member in changed.members.values()] == ["none", "d4"]
    assert list(changed.members) == ["teachers.0", "teachers.1"]
    with pytest.raises(
        ConfigError, match=r"--set teachers.2.tta: 2 is not an index of a list of 2; indices are counted from 0"
    ):
        load_config(tmp_path / "c.yaml", ["teachers.2.tta=d4"])


def test_overrides_are_yaml():
    config = load_config("demo", ["data.train=[a, b]", "train.max_steps=null", "train.lr=5e-4", "teacher.window=512"])
    assert (config.data.train, config.train.max_steps) == (["a", "b"], None)
    assert (config.train.lr, config.teacher.window) == (5e-4, 512)


@pytest.mark.parametrize(
    ("overrides", "effective"),
    [
        (["train.batch_size=auto"], 8),  # the size in the file, which auto replaces
        (["train.accumulate=3", "train.batch_size=auto"], 24),
        (["train.batch_size=auto", "train.effective_batch_size=6"], 6),
        (["train.effective_batch_size=6", "train.batch_size=auto"], 6),
        (["train={batch_size: auto}"], 4),  # the default
    ],
)
def test_auto_keeps_the_size_of_a_step(overrides, effective):
    train = load_config("demo", overrides).train
    assert (train.batch_size, train.samples_per_step) == ("auto", effective)


def test_auto_computes_accumulate_itself():
    with pytest.raises(ConfigError, match=r"accumulate is 2, but batch_size: auto computes it: leave it out"):
        load_config("demo", ["train.batch_size=auto", "train.accumulate=2"])


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="the key 'name' occurs twice"):
        load_config(tmp_path / "c.yaml")


def test_teachers_may_be_written_with_yaml_merge_keys(tmp_path):
    raw = several()
    teacher = raw.pop("teachers")[0]
    text = yaml.safe_dump(raw) + "teachers:\n  - &first " + json.dumps(teacher) + "\n  - <<: *first\n    tta: d4\n"
    (tmp_path / "c.yaml").write_text(text)
    first, second = load_config(tmp_path / "c.yaml").teachers
    assert second == first.model_copy(update={"tta": "d4"})


@pytest.mark.parametrize("content", ["[1, 2]", "a: !!python/object/apply:os.system [ls]", "\t", "a: &b [*b]"])
def test_files_that_are_not_configs_are_refused(content, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_names_its_path_and_the_nearest_shipped_config():
    with pytest.raises(ConfigError, match=r"no config at /.*/dubai/linknet_dk, .* did you mean dubai/linknet_kd\?"):
        load_config("dubai/linknet_dk")


def test_the_class_map_is_teacher_rows_by_student_columns():
    config = load_config("demo")
    expected = np.zeros((8, 6), dtype=np.float32)
    for row, columns in enumerate([{1: 1}, {2: 0.7, 5: 0.3}, {3: 1}, {4: 1}, {4: 1}, {5: 1}, {0: 1}, {0: 1}]):
        for column, share in columns.items():
            expected[row, column] = share
    np.testing.assert_array_equal(config.class_map_matrix(), expected)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_config("demo").seed = 3  # type: ignore[misc]


def keys(model):
    for name, info in model.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if nested:
            for kind in nested:
                yield from keys(kind)
        else:
            yield name


@pytest.mark.parametrize("key", sorted(set(keys(Config))))
def test_every_key_is_read_by_the_program(key):
    sources = [p for package in ("data", "cache", "pipeline") for p in (ROOT / package).rglob("*.py")]
    schema = Path(sections.__file__).parent
    text = "\n".join(
        [
            *(path.read_text() for path in sources),
            *((schema / f"{name}.py").read_text() for name in ("config", "student", "teacher")),
            (schema / "data.py").read_text().partition("def pairs")[2],
        ]
    )
    # num_classes is only checked; the program reads the names.
    assert f".{key}" in text or key == "num_classes"


def test_sections_that_may_be_left_out_have_the_documented_defaults():
    raw = load_config("demo").model_dump(mode="json")
    del raw["distill"], raw["train"]
    config = parse_config(raw, "test")
    assert (config.distill.temperature, config.distill.alpha) == (2.0, 0.7)
    assert (config.train.epochs, config.train.batch_size) == (45, 4)
    assert (config.train.lr, config.train.backbone_lr, config.train.weight_decay) == (6e-4, 6e-5, 2.5e-4)


GUIDE = yaml.safe_load("""
group: biodiversity
seed: 42
classes:
  names: [Background, Forest, Grassland, Cropland, Settlement, SemiNatural]
  ignore_index: 255
  not_scored: [Background]
teacher:
  architecture: unet
  encoder: efficientnet-b4
  checkpoint: pretrain_weights/u-efficientnet-b4_s0_CELoss_pretrained.pth
  classes: [Tree, Rangeland, Cropland, Developed, Road, Bareland, Water, Background]
  normalize: unit
  tta: none
  scales: [1.0]
  window: null
distill: {temperature: 2.0, alpha: 0.7}
cache: {kind: soft, bits: 8}
train: {epochs: 45, max_steps: null, batch_size: 4, val_batch_size: 4, lr: 6.0e-4, backbone_lr: 6.0e-5, weight_decay: 2.5e-4,
        lookahead: true, restart_epochs: 15, restart_mult: 2, crop: 512, scales: [0.5, 0.75, 1.0, 1.25, 1.5],
        max_class_share: 0.75, mosaic: 0.25, accumulate: 1}
""")


@pytest.mark.parametrize(
    ("name", "run", "architecture", "mode"),
    [
        ("ftunetformer_kd", "ftunetformer-kd-512-crop-ms-e45", "ftunetformer", "cached"),
        ("ftunetformer", "ftunetformer-512-crop-ms-e45", "ftunetformer", "none"),
        ("unetformer_kd", "unetformer-kd-512-crop-ms-e45", "unetformer", "cached"),
    ],
)
def test_the_guides_configs_have_the_guides_numbers(name, run, architecture, mode):
    config = load_config(f"biodiversity/{name}").model_dump(mode="json")
    assert (config["name"], config["student"]["architecture"], config["distill"]["mode"]) == (run, architecture, mode)
    for section, expected in GUIDE.items():
        found = config[section]
        for key, value in expected.items() if isinstance(expected, dict) else ((None, expected),):
            assert (found if key is None else found[key]) == value, f"{section}.{key}"


def test_the_guides_baseline_differs_only_in_the_teacher():
    taught, alone = (load_config(f"biodiversity/{name}").model_dump() for name in ("ftunetformer_kd", "ftunetformer"))
    taught["distill"]["mode"], taught["name"] = alone["distill"]["mode"], alone["name"]
    assert taught == alone


OPENEARTHMAP = ["Unknown", "Bareland", "Rangeland", "Developed", "Road", "Tree", "Water", "Cropland", "Building"]


def test_openearthmaps_config_differs_from_the_guides_only_in_the_teacher():
    guide, nine = (load_config(f"biodiversity/ftunetformer_kd{tail}") for tail in ("", "_openearthmap"))
    assert nine.teacher.classes == OPENEARTHMAP
    assert nine.teacher.drop_channels == [0]
    expected, found = guide.model_dump(), nine.model_dump()
    found["teacher"] |= {key: expected["teacher"][key] for key in ("classes", "drop_channels")}
    for key in ("name", "class_map"):
        found[key] = expected[key]
    found["cache"]["path"] = expected["cache"]["path"]
    assert found == expected
    assert nine.cache.path != guide.cache.path


def test_openearthmaps_class_map_agrees_with_the_guides_and_has_building():
    guide, nine = (load_config(f"biodiversity/ftunetformer_kd{tail}") for tail in ("", "_openearthmap"))
    assert {name: guide.class_map[name] for name in guide.class_map if name != "Background"} == {
        name: row for name, row in nine.class_map.items() if name != "Building"
    }
    assert nine.class_map["Building"] == {"Settlement": 1}
    matrix = nine.class_map_matrix()
    assert matrix.shape == (8, 6)  # of nine channels the first is dropped
    names = nine.classes.names
    assert [names[column] for column in matrix.argmax(axis=1)] == [
        "SemiNatural", "Grassland", "Settlement", "Settlement", "Forest", "Background", "Cropland", "Settlement",
    ]  # fmt: skip


@pytest.mark.parametrize("section", sections.Section.__subclasses__(), ids=lambda section: section.__name__)
def test_every_key_has_a_description(section):
    """The reference in the docs, and editors, show it."""
    for key, field in section.model_fields.items():
        assert field.description is not None, key
        assert field.description.endswith("."), key
