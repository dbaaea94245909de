"""Damaged and hostile checkpoints end in one paragraph: nothing is fetched, executed, or allocated beyond what they hold."""

import errno
import os
import struct
import warnings
import zipfile
from functools import partial
from pathlib import Path

import psutil
import pytest
import timm
import torch
from helpers.configs import tiny_config
from helpers.mutation_runs import SMALL, trainer, write_student
from helpers.mutations import LAUGHS
from torch.serialization import set_crc32_options

from kdpipe.configs import dump_config
from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.configs.load import parse_mapping
from kdpipe.pipeline.inspection.checkpoint import inspect_checkpoint
from kdpipe.pipeline.models.weights import read_checkpoint
from kdpipe.pipeline.runs.checkpoint import load_trained, recorded, restore

PROTO = b"\x80\x02"
PICKLES = {
    "nothing on the stack": b".",
    "a tuple of nothing": b"\x87.",
    "an unhashable key": b"}]Ns.",
    "no arguments": b"ctorch._utils\n_rebuild_tensor_v2\nNR.",
    "a negative size": b"ctorch\nSize\n(J\xff\xff\xff\xfftR.",
    "no opcode": b"\xff.",
    "cut off": b"}X\x05\x00\x00\x00ab",
}


def shared():
    """Forty lists, each of which holds the one before twice: written out, more values than there is memory."""
    found = ["ha"]
    for _ in range(40):
        found = [found, found]
    return found


def within_itself():
    found = []
    found.append(found)
    return found


def archive(path, pickled, **records):
    with zipfile.ZipFile(path, "w") as written:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **records}.items():
            written.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("pickled", PICKLES.values(), ids=list(PICKLES))
def test_a_pickle_that_is_wrong_is_one_paragraph(pickled, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"t\.pth is not a readable checkpoint: damaged, or not a file that torch"
    ) as caught:
        read_checkpoint(archive(tmp_path / "t.pth", PROTO + pickled))
    assert len(str(caught.value)) < 500


def test_one_changed_bit_in_a_weight_is_noticed(teacher_file, tmp_path):
    data = bytearray(teacher_file.read_bytes())
    with zipfile.ZipFile(teacher_file) as read:
        record = max(read.infolist(), key=lambda record: record.file_size)
    data[record.header_offset + record.file_size // 2] ^= 1
    (tmp_path / "t.pth").write_bytes(data)
    torch.load(tmp_path / "t.pth", weights_only=True)  # torch takes it
    with pytest.raises(CheckpointError, match=r"not a readable checkpoint.*Bad CRC-32"):
        read_checkpoint(tmp_path / "t.pth")


def test_a_file_that_was_saved_without_checksums_is_read(tmp_path):
    set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, tmp_path / "t.pth")
    finally:
        set_crc32_options(True)
    assert read_checkpoint(tmp_path / "t.pth")["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_disk_that_fails_is_told_as_such_and_not_as_damage(teacher_file, monkeypatch):
    def failing(self, *arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(CheckpointError, match=r"reading .*\.pth failed, as its disk or mount failed"):
        read_checkpoint(teacher_file)


def test_what_was_read_no_longer_depends_on_the_file(tmp_path):
    torch.save({"a": torch.ones(5)}, tmp_path / "t.pth")
    found = read_checkpoint(tmp_path / "t.pth")["a"]
    (tmp_path / "t.pth").write_bytes(bytes((tmp_path / "t.pth").stat().st_size))
    assert found.tolist() == [1] * 5


def with_numbers(tmp_path, number):
    """A tensor whose pickle claims `number` of numbers in its record, and in itself, instead of 200."""
    torch.save({"a": torch.zeros(200)}, tmp_path / "own.pth")
    with zipfile.ZipFile(tmp_path / "own.pth") as read:
        records = {name.partition("/")[2]: read.read(name) for name in read.namelist()}
    pickled = records.pop("data.pkl")
    assert pickled.count(b"K\xc8") == 2
    return archive(tmp_path / "t.pth", pickled.replace(b"K\xc8", b"J" + struct.pack("<i", number)), **records)


def test_a_tensor_beyond_the_end_of_the_file_is_refused(tmp_path):
    assert len(read_checkpoint(with_numbers(tmp_path, 200))["a"]) == 200
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        read_checkpoint(with_numbers(tmp_path, 2**28))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "pickled",
    [b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.", b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.",
     b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR."],
    ids=["bytearray", "bytearray of Python 2", "encode"],
)  # fmt: skip
def test_a_pickle_that_allocates_is_refused_before_it_is_read(pickled, zipped, tmp_path):
    if zipped:
        archive(tmp_path / "t.pth", PROTO + pickled)
    else:
        (tmp_path / "t.pth").write_bytes(PROTO + pickled)
    before = psutil.Process().memory_info().rss
    with pytest.raises(CheckpointError, match=r"holds more than weights: .*(bytearray|encode)"):
        read_checkpoint(tmp_path / "t.pth")
    assert psutil.Process().memory_info().rss - before < 100e6


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.zeros(1).expand(2**30), "would take 4294967296 bytes, and 4 are stored"),
        (lambda: torch.eye(3).to_sparse(), "holds a sparse_coo cpu Tensor"),
        (lambda: torch.zeros(3, device="meta"), "holds a strided meta Tensor"),
        (lambda: shared(), "its lists hold each other, and written out they have more than 16777216 values"),
        (lambda: within_itself(), "its lists hold each other"),
    ],
    ids=["expanded", "sparse", "meta", "shared", "within itself"],
)
def test_what_is_small_in_the_file_and_large_in_memory_is_refused(tensor, message, tmp_path):
    torch.save({"a": [tensor()]}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "t.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: archive(path, b"x", **{"data.pkl2": b""}), "not a readable"),
        (lambda path: path.write_bytes(path.read_bytes() + b"PK\5\6" + bytes(18)), "not a readable|does not end as"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(30)), "does not end as its archive does"),
        (lambda path: doubled(path), "it has two records of one name"),
        (lambda path: compressed(path), "its records are compressed, which torch.save never does"),
        (lambda path: archive(path, b"N" * (2**24 + 1)), "more than the 16777216 that are read"),
    ],
    ids=["no pickle", "a second end", "bytes behind", "doubled", "compressed", "a long pickle"],
)
def test_an_archive_of_another_form_is_refused(change, message, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "t.pth")
    change(tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "t.pth")


def doubled(path):
    with zipfile.ZipFile(path, "a") as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written.writestr("t/data.pkl", b"N.")


def compressed(path):
    with zipfile.ZipFile(path) as read:
        records = {name: read.read(name) for name in read.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as written:
        for name, content in records.items():
            written.writestr(name, content)


@pytest.fixture
def student(landscape, teacher_file, tmp_path):
    """Writes a student's checkpoint after `change` altered its content; keywords override its configuration."""

    def write(change=lambda content: None, **overrides):
        config = tiny_config(landscape, teacher_file, tmp_path, **{"student__options": SMALL, **overrides})
        write_student(tmp_path / "last.ckpt", config)
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    return write


@pytest.mark.long
def test_a_student_is_read_resumed_and_inspected(student, landscape, teacher_file, tmp_path):
    path = student()
    assert load_trained(path).position.steps == 2
    assert inspect_checkpoint(str(path)).student.name == "tests/tiny"
    config = tiny_config(landscape, teacher_file, tmp_path, student__options=SMALL)
    assert restore(path, config, None, *trainer(config))[0].history == ({"step": 2, "miou": 0.25},)


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def put(value, *keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(None, "kdpipe"), r"is not a whole checkpoint of `kdpipe train-student` \(kdpipe: "),
        (put([], "kdpipe"), r"is not a whole checkpoint of `kdpipe train-student` \(kdpipe: "),
        (drop("kdpipe", "config"), r"is not a whole checkpoint .*\(kdpipe.config: Field required\)"),
        (put(7, "kdpipe", "mode"), r"is not a whole checkpoint .*\(kdpipe.mode: "),
        (put([[1.0, 1.0]], "kdpipe", "stretch"), r"\(kdpipe.stretch.0: a stretch needs low < high, found 1, 1\)"),
        (put("x", "position", "steps"), r"\(position.steps: "),
        (put(-1, "position", "batches"), r"\(position.batches: "),
        (put(5, "state_dict"), r"\(state_dict: |should be a bare state dict"),
        (put("a: [1", "kdpipe", "config"), r"the configuration in .*last\.ckpt is not readable YAML"),
        (put("[" * 1200, "kdpipe", "config"), r"the configuration in .*last\.ckpt is not readable YAML: it is nested too deep"),
        (put(LAUGHS, "kdpipe", "config"), r"the configuration in .*with its aliases expanded it has more than 100000 values"),
        (put("x" * 2**21, "kdpipe", "config"), r"the configuration in .* has more than 1048576 bytes"),
        (put("a: !!python/object/apply:os.system ['touch canary']", "kdpipe", "config"), "could not determine a constructor"),
        (put("5", "kdpipe", "config"), "should hold a mapping of sections, found int"),
        (put("name: x", "kdpipe", "config"), r"the configuration in .*last\.ckpt(: | is not one of kdpipe)"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_student_whose_record_is_wrong_is_refused_by_all_that_read_it(
    student, change, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = student(change)
    readers = [load_trained, lambda path: inspect_checkpoint(str(path))]
    if "not one of kdpipe" not in message:
        readers.append(recorded)
    for read in readers:
        with pytest.raises((CheckpointError, ConfigError), match=message):
            read(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [drop("optimizer"), put(3, "optimizer"), put({"state": {}, "param_groups": []}, "optimizer"), put(None, "precision"),
     drop("scheduler")],
    ids=range(5),
)  # fmt: skip
def test_a_run_whose_optimizer_is_damaged_is_not_resumed(student, change, landscape, teacher_file, tmp_path):
    path = student(change)
    config = tiny_config(landscape, teacher_file, tmp_path, student__options=SMALL)
    with pytest.raises(CheckpointError, match="cannot be resumed from, as the state of its optimizer is damaged"):
        restore(path, config, None, *trainer(config))


def test_a_configuration_of_a_far_larger_network_is_refused_before_it_is_built(
    student, landscape, teacher_file, tmp_path
):
    large = {"encoder_depth": 3, "decoder_channels": [30_000, 30_000, 30_000]}
    config = dump_config(tiny_config(landscape, teacher_file, tmp_path, student__options=large))
    before = psutil.Process().memory_info().rss
    with pytest.raises(CheckpointError, match=r"which describes a network of \d{11} numbers, and \d{5} are stored"):
        load_trained(student(put(config, "kdpipe", "config")))
    assert psutil.Process().memory_info().rss - before < 500e6


@pytest.mark.parametrize(
    "encoder", ["tu-hf-hub:stranger/net", "tu-hf_hub:stranger/net", "tu-local-dir:/srv/net", "tu-timm:resnet18"]
)
def test_an_encoder_that_would_be_fetched_is_never_asked_for(
    student, landscape, teacher_file, tmp_path, monkeypatch, encoder
):
    config = dump_config(tiny_config(landscape, teacher_file, tmp_path, student__encoder=encoder))
    path = student(put(config, "kdpipe", "config"))
    asked = partial(pytest.fail, "timm was asked")
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: asked())
    with pytest.raises(CheckpointError, match="which timm would fetch from elsewhere"):
        load_trained(path)
    assert inspect_checkpoint(str(path)).network.encoder is None


def test_a_character_written_as_two_escapes_is_one_and_half_of_one_is_refused():
    assert parse_mapping(r'a: "\ud83d\ude00"', "c.yaml") == {"a": "\N{GRINNING FACE}"}
    with pytest.raises(ConfigError, match=r"c\.yaml is not readable YAML: half of a character"):
        parse_mapping(r'a: "\ud83d"', "c.yaml")
