"""Every message that docs/troubleshooting.md quotes is raised here and compared."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from affine import Affine
from helpers.doubles import Lines, Plain
from helpers.files import write_image, write_tiff
from helpers.out_of_memory import CUDA, Exhausted
from PIL import Image

from kdpipe.cache import Softening, SoftTargetCache
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.configs.errors import KdpipeError, OutOfMemory
from kdpipe.configs.files import try_to_write
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.evaluation.evaluate import evaluate, teacher_model
from kdpipe.pipeline.memory import fits_in_memory
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.frozen import FrozenTeacher
from kdpipe.pipeline.training import batch_size
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.divergence import growth_hint
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text()


def quotes() -> dict[str, str]:
    """Every quoted message by its heading; `heading (2)` is the second one below it."""
    found: dict[str, str] = {}
    for section in re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for i, text in enumerate(re.findall(r"```text\n(.+?)\n```", section, flags=re.DOTALL)):
            found[heading if i == 0 else f"{heading} ({i + 1})"] = text
    return found


CASES = {}


def case(name):
    def register(function):
        assert name not in CASES
        CASES[name] = function
        return function

    return register


class Context:
    """Configs on the small landscape, a complete cache, and a folder to write to."""

    def __init__(self, make_config, tmp_path, monkeypatch, landscape, finished_cache):
        self.make, self.folder, self.patch, self.landscape = make_config, tmp_path, monkeypatch, landscape
        self._finished_cache = finished_cache

    def cached(self, **changes):
        shutil.copytree(self._finished_cache, self.make().cache.path)
        return self.make(**changes)

    def student(self, module):
        self.patch.setattr(training, "starting_student", lambda *args, **options: module)


@case("The file has another number of channels than teacher.classes")
def _(c):
    precompute(c.make(teacher__classes=[*"abcdefghi"], class_map={k: {"Forest": 1} for k in "abcdefghi"}), CPU)


@case("The file holds another network")
def _(c):
    precompute(c.make(teacher__encoder="resnet18"), CPU)


@case("The file would execute code")
def _(c):
    torch.save({"weights": Path("x"), "code": print}, c.folder / "code.pth")
    precompute(c.make(teacher__checkpoint=str(c.folder / "code.pth")), CPU)


@case("The weights are not finite")
def _(c):
    state = torch.load(c.make().teacher.checkpoint)
    state["segmentation_head.0.bias"][0] = torch.nan
    torch.save(state, c.folder / "nan.pth")
    precompute(c.make(teacher__checkpoint=str(c.folder / "nan.pth")), CPU)


@case("The network takes images of one size")
def _(c):
    network = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=8)
    torch.save(network.state_dict(), c.folder / "vit.pth")
    write_image(c.folder / "large/images/t.png", 230, 256)
    teacher = {"architecture": "dpt", "encoder": "tu-vit_tiny_patch16_224", "checkpoint": str(c.folder / "vit.pth")}
    data = {"train": [str(c.folder / "large")], "allow_missing_masks": True}
    precompute(c.make(teacher=teacher | {"classes": c.make().teacher.classes}, data=data), CPU)


@case("A student cannot train on its batches")
def _(c):
    train(c.cached(student={"architecture": "deeplabv3plus", "encoder": "resnet18"}, train__batch_size=1), CPU)


@case("The file does not exist")
def _(c):
    precompute(c.make(teacher__checkpoint="gone.pth"), CPU)


@case("student.num_classes is 8")
def _(c):
    c.make(student__num_classes=8)


@case("student.checkpoint has 8 classes")
def _(c):
    torch.save(build_student("unet", 8, encoder="mobilenet_v2").state_dict(), c.folder / "eight.pth")
    train(c.cached(student__checkpoint=str(c.folder / "eight.pth")), CPU)


@case("student.checkpoint has 8 classes (2)")
def _(c):
    torch.save(build_student("unetformer", 8, encoder="resnet18").state_dict(), c.folder / "eight.pth")
    build_student("unetformer", 6, encoder="resnet18", checkpoint=str(c.folder / "eight.pth"))


@case("student.checkpoint is the teacher's file")
def _(c):
    c.make(student__checkpoint=c.make().teacher.checkpoint)


@case("The masks hold values up to 7")
def _(c):
    Image.fromarray(np.arange(8, dtype=np.uint8)[None]).save(c.folder / "mask.png")
    read_mask(c.folder / "mask.png", 6, 255)


@case("Training")
def _(c):
    c.student(Exhausted(CUDA))
    train(c.cached(), CPU)


@case("Training (2)")
def _(c):
    def build(*args, **options):
        student = Plain()
        student.register_forward_pre_hook(lambda module, inputs: _raise_above(2, len(inputs[0])))
        return student

    c.patch.setattr(batch_size, "untrained_student", build)
    lines = Lines()
    batch_size.resolve_batch_size(c.make(train__batch_size="auto"), CPU, lines)
    return lines.said[0]


@case("Validation")
def _(c):
    student = Exhausted(CUDA)
    student.training_too = False
    c.student(student)
    train(c.cached(), CPU)


@case("Validation (2)")
def _(c):
    c.patch.setattr(FrozenTeacher, "logits", _exhausted)
    evaluate(teacher_model(c.make(), CPU, tta=None, window=None))


@case("The teacher, in precompute-teacher and verify-cache")
def _(c):
    for name in "abc":
        write_image(c.folder / "Same" / "images" / f"{name}.png", 70, 80)
    (c.folder / "Same" / "masks").mkdir()
    c.patch.setattr(FrozenTeacher, "logits", _exhausted)
    precompute(c.make(teacher__batch_size=3, data__train=[str(c.folder / "Same")], data__allow_missing_masks=True), CPU)


@case("The teacher, online")
def _(c):
    c.patch.setattr(FrozenTeacher, "logits", _exhausted)
    train(with_mode(c.make(), "online"), CPU)


@case("A worker of the data loader died")
def _(c):
    with fits_in_memory("while training", [], workers=4):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@case("A worker of the data loader died (2)")
def _(c):
    with fits_in_memory("while training", [], workers=4):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")


@case("The loss is NaN or infinite")
def _(c):
    c.student(Plain())
    train(c.cached(train__lr=1e30, train__backbone_lr=1e30), CPU)


@case("The soft targets are not finite")
def _(c):
    read = SoftTargetCache.read
    c.patch.setattr(SoftTargetCache, "read", lambda *args, **options: read(*args, **options) * np.float32("nan"))
    c.student(Plain())
    train(c.cached(), CPU)


@case("The loss grows")
def _(c):
    return growth_hint([1.0] * 50 + [2.0] * 50, c.make(), "fp32")


@case("The teacher's classes are in another order")
def _(c):
    """Labels that the teacher itself predicts, and a config in which two of its channels have changed places."""
    root = c.folder / "Own"
    for i in range(4):
        write_image(root / "images" / f"{i}.png", 64, 64, seed=i)
    (root / "masks").mkdir()
    own = {"data__train": [str(root)], "data__allow_missing_masks": True}
    config = c.make(cache__kind="logits", cache__path=str(c.folder / "own.zarr"), **own)
    order = list(config.teacher.classes)
    precompute(config, CPU)
    channels = SoftTargetCache.open(config.cache.path, Softening(1.0, np.eye(len(order), dtype=np.float32)))
    students = SoftTargetCache.open(config.cache.path, Softening(1.0, config.class_map_matrix()))
    pixels = np.zeros(len(order), dtype=np.int64)
    for tile in channels.tile_ids:
        pixels += np.bincount(channels.read(tile).argmax(axis=0).ravel(), minlength=len(order))
        labels = students.read(tile).argmax(axis=0).astype(np.uint8)
        Image.fromarray(labels).save(root / "masks" / f"{tile.split('/')[1]}.png")
    row = [config.class_map[name] for name in order]
    i, *rarer = np.argsort(-pixels)
    j = next(channel for channel in rarer if row[channel] != row[i])
    order[i], order[j] = order[j], order[i]
    wrong = c.make(teacher__classes=order, cache__path=str(c.folder / "wrong.zarr"), **own)
    precompute(wrong, CPU)
    return next(f.message for f in verify(wrong, "parity", CPU).findings if f.code == "class-map")


case("The cache is stale")(lambda c: train(c.cached(distill__temperature=4.0), CPU))
case("The cache is missing or unfinished")(lambda c: train(c.make(), CPU))


@case("A tile is damaged")
def _(c):
    config = c.cached()
    shard = next(Path(config.cache.path).glob("tiles/Train/*/0.0.0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    train(config, CPU)


@case("Another process is writing the cache, or trains a run of the same name")
def _(c):
    config = c.make()
    with writer_lock(open_storage(config.cache.path)):
        precompute(config, CPU)


@case("The disk is full")
def _(c):
    c.patch.setattr(LocalStorage, "free_bytes", lambda self: 0)
    precompute(c.make(), CPU)


@case("The lock was lost")
def _(c):
    c.patch.setattr("kdpipe.cache.storage.object_lock.LOOK_SECONDS", 0.0)
    with writer_lock(open_storage("memory://kdpipe-tests/lost.zarr")) as require:
        open_storage("memory://kdpipe-tests/lost.zarr.lock").write("", b'{"host": "b", "pid": 7, "since": "noon"}')
        require()


NO_FOLDER = Path("/dev/null/x.json")
case("The path of the cache is refused")(lambda c: open_storage("s3://"))
case("A file cannot be read or written")(lambda c: try_to_write(NO_FOLDER, NO_FOLDER, "--json: writing"))


@case("The cache was read and then forked")
def _(c):
    config = c.make(cache__path="memory://kdpipe-tests/troubleshooting.zarr")
    precompute(config, CPU)
    cache = SoftTargetCache.open(config.cache.path)
    cache.read(cache.tile_ids[0])
    c.patch.setattr("os.getpid", lambda: 1)
    cache.read(cache.tile_ids[0])


@case("Resuming is refused")
def _(c):
    c.student(Plain())
    config = c.cached(train__max_steps=1, data__val=[])
    train(config, CPU)
    train(c.make(train__max_steps=1, data__val=[], train__lr=0.5), CPU, resume=True)


@case("The run exists")
def _(c):
    c.student(Plain())
    config = c.cached(train__max_steps=1, data__val=[])
    train(config, CPU)
    train(config, CPU)


@case("Some tiles have no labels")
def _(c):
    write_image(c.folder / "Bare" / "images" / "a.png", 64, 64)
    (c.folder / "Bare" / "masks").mkdir()
    precompute(c.make(data__train=[str(c.folder / "Bare")]), CPU)


@case("An epoch has fewer samples than a step")
def _(c):
    train(c.cached(train__accumulate=4), CPU)


def _own(c):
    shutil.copytree(c.landscape, c.folder / "own")
    config = c.make(data={"train": [str(c.folder / "own/Train")], "val": []}, distill={"mode": "none"})
    return config, list_tiles(config.data, "train")


@case("Images and masks contradict each other")
def _(c):
    config, tiles = _own(c)
    for tile, colours in zip(tiles, ([*"bgr"], [*"rgb"], *[[*"bgr"]] * 4), strict=True):
        pixels_BHW = np.asarray(Image.open(tile.image)).transpose(2, 0, 1)
        tile.image.unlink()
        names = {"r": "red", "g": "green", "b": "blue"}
        write_tiff(tile.image.with_suffix(".tif"), pixels_BHW, [names[colour] for colour in colours])
    precompute(config, CPU)


@case("Images and masks contradict each other (2)")
def _(c):
    config, tiles = _own(c)
    pixels_BHW = np.asarray(Image.open(tiles[0].image)).transpose(2, 0, 1)
    labels_BHW = np.asarray(Image.open(tiles[0].mask))[None]
    height = labels_BHW.shape[1]
    for path, values_BHW, transform in ((tiles[0].image, pixels_BHW, Affine(1, 0, 0, 0, -1, 0)),
                                        (tiles[0].mask, labels_BHW, Affine(1, 0, 0, 0, 1, -height))):  # fmt: skip
        path.unlink()
        write_tiff(path.with_suffix(".tif"), values_BHW, transform=transform)
    precompute(config, CPU)


@case("Images and masks contradict each other (3)")
def _(c):
    config, tiles = _own(c)
    for tile in tiles:
        Image.fromarray(np.full_like(np.asarray(Image.open(tile.mask)), 255)).save(tile.mask)
    train(config, CPU)


@case("Images are not 8 bits")
def _(c):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(c.folder / "wide.tif")
    read_image(c.folder / "wide.tif", (1, 1, 1), None)


def _raise_above(most, size):
    if size > most:
        raise CUDA


def _exhausted(self, images):
    raise CUDA


def test_every_quoted_message_has_a_case_and_every_case_a_quote():
    assert set(quotes()) == set(CASES)


@pytest.mark.long
@pytest.mark.parametrize("name", list(CASES))
def test_the_program_prints_what_the_page_quotes(name, make_config, tmp_path, monkeypatch, landscape, finished_cache):
    context = Context(make_config, tmp_path, monkeypatch, landscape, finished_cache)
    try:
        message = CASES[name](context)
    except KdpipeError as err:
        message = str(err)
        assert isinstance(err, OutOfMemory) == message.startswith(("out of memory", "a worker", "the data loader"))
    assert message is not None, "nothing was raised"
    pattern = ".*".join(re.escape(part) for part in quotes()[name].split("…"))
    assert re.fullmatch(pattern, message, flags=re.DOTALL), f"the page says\n{quotes()[name]}\nthe program\n{message}"
