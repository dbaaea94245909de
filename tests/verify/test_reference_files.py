"""verify-cache --reference: which files are read, what is refused, and what the command prints, writes and returns."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import owner_script as own
from helpers.commands import run_command
from helpers.dubai import link_tiles
from helpers.files import write_image, write_tiff
from PIL import Image

from kdpipe.configs import dump_config, load_config
from kdpipe.configs.errors import DataError
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.reports.terminal.verify import verify_tables
from kdpipe.pipeline.verify.gate import verify
from kdpipe.pipeline.verify.reference_files import match_files, read_scores

CPU = torch.device("cpu")
CLASSES = ["Tree", "Road", "Water"]
SCORES = np.random.default_rng(0).normal(0, 3, (3, 4, 5)).astype(np.float32)


def read(path, classes=CLASSES):
    return read_scores(path, classes, 4, 5)


def saved(folder, array, name="t.npy"):
    np.save(folder / name, array)
    return folder / name


@pytest.mark.parametrize("suffix", ["npy", "npz", "compressed npz", "tif"])
def test_scores_are_read_from_each_format(tmp_path, suffix):
    path = tmp_path / f"t.{suffix.split()[-1]}"
    if suffix == "tif":
        write_tiff(path, SCORES)
    else:
        {"npy": np.save, "npz": np.savez, "compressed npz": np.savez_compressed}[suffix](path, SCORES)
    found = read(path)
    np.testing.assert_array_equal(found.values_CHW, SCORES)
    assert (found.kind, found.rounding, found.computed_in) == ("logits", 0, None)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (SCORES.argmax(axis=0), r"holds int64 values of shape \(4, 5\), indices of classes \(an argmax\).*float \(3, 4, 5\)"),
        (SCORES.astype(np.uint8), "indices of classes"),
        (SCORES > 0, "holds bool values"),
        (SCORES.astype(complex), "holds complex128 values: save the scores as floats"),
        (np.eye(3, dtype=np.float32)[SCORES.argmax(axis=0)].transpose(2, 0, 1), "an argmax as one-hot"),
        (SCORES[:2], r"has the shape \(2, 4, 5\), and its tile needs \(3, 4, 5\).*Save every channel"),
        (SCORES.transpose(1, 2, 0), r"This is \(H, W, C\): save scores.transpose\(2, 0, 1\)"),
        (SCORES[None], r"This is a batch of one: save scores\[0\]"),
        (SCORES.max(axis=0), "no scores of classes but one value for each pixel"),
        (np.zeros((3, 32, 32), np.float32), "Resize the scores to the tile's size, or crop what was padded"),
        (np.where(SCORES > 1, np.nan, SCORES), "holds NaN or infinity in [0-9]+ of its values"),
        (np.float32(1), r"has the shape \(\), and its tile needs"),
        (np.array([{"a": 1}]), "Python objects, which could execute code"),
    ],
)  # fmt: skip
def test_what_holds_no_scores_is_refused(tmp_path, array, said):
    with pytest.raises(DataError, match=said):
        read(saved(tmp_path, array))


def test_archives_of_several_arrays_or_of_objects_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", logits=SCORES, probs=SCORES)
    with pytest.raises(DataError, match=r"holds 2 arrays \(logits, probs\): save one"):
        read(tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", np.array([None, SCORES], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        read(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("name", "content"), [("t.npy", b"no"), ("t.npy", b""), ("t.npz", b"PK\3\4no"), ("t.tif", b"II*\0")]
)
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(name)} is damaged|cannot read .*{re.escape(name)}"):
        read(tmp_path / name)


def test_a_geotiff_of_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds uint8 values"):
        read(write_tiff(tmp_path / "t.tif", SCORES[:1].astype(np.uint8)))


@pytest.mark.parametrize(
    ("array", "kind", "computed_in"),
    [
        (own.softmax(SCORES), "probabilities", None),
        (np.log(own.softmax(SCORES)), "log-probabilities", None),
        (1 / (1 + np.exp(-SCORES)), "values in 0..1", None),
        (SCORES.astype(np.float16).astype(np.float32), "logits", "fp16"),
        (torch.from_numpy(SCORES).bfloat16().float().numpy(), "logits", "bf16"),
    ],
)
def test_the_kind_of_scores(tmp_path, array, kind, computed_in):
    found = read(saved(tmp_path, array))
    assert (found.kind, found.computed_in) == (kind, computed_in)


@pytest.mark.parametrize("scale", [1, 30])
def test_storing_in_float16_moves_a_probability_by_less_than_is_allowed(tmp_path, scale):
    scores = SCORES * scale
    found = read(saved(tmp_path, scores.astype(np.float16)))
    moved = np.abs(own.softmax(found.values_CHW) - own.softmax(scores)).max()
    assert 0 < moved <= 1.1 * found.rounding
    assert found.rounding < 4e-3


TILES = [Tile(name, Path(f"{name}.png"), None) for name in ("Train/a", "Train/b", "More/b", "More/gr\u00fcn")]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_are_matched_by_stem_or_id(tmp_path):
    touch(tmp_path, "a.npy", "More/b.npz", "gru\u0308n.TIF", "other.npy", "notes.txt")
    matched, strangers = match_files(tmp_path, TILES)
    assert {tile.id: path.name for tile, path in matched} == {
        "Train/a": "a.npy",
        "More/b": "b.npz",
        "More/grün": "gru\u0308n.TIF",
    }
    assert [path.name for path in strangers] == ["other.npy"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], r"no file in .* is named as a tile: expected scores such as a.npy or Train/a.npy; found no .npy, .npz, .tif, .tiff"),
        (["c.npy"], "found c.npy"),
        (["b.npy"], r"may belong to any of Train/b, More/b: name it by the tile's id, as .*/Train/b.npy"),
        (["a.npy", "Train/a.tif"], "two files hold the scores of Train/a"),
    ],
)  # fmt: skip
def test_files_that_belong_to_no_single_tile_are_refused(tmp_path, names, said):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=said):
        match_files(tmp_path, TILES)


@pytest.fixture
def one_tile(make_config, tmp_path):
    (tmp_path / "Mine/images").mkdir(parents=True)
    write_image(tmp_path / "Mine/images/t.png", 64, 64)
    return make_config(data__train=[str(tmp_path / "Mine")], data__val=[], data__allow_missing_masks=True)


def test_the_command_compares_without_a_cache_and_after_the_checks_of_one(one_tile, teacher_file, tmp_path):
    Path("c.yaml").write_text(dump_config(one_tile))
    Path("r").mkdir()
    command = ["verify-cache", "-c", "c.yaml", "--level", "quick", "--reference", "r", "--json", "report.json"]
    inputs = own.pixels("Mine/images/t.png") / 255
    net = own.network(teacher_file)
    np.save("r/t.npy", own.logits(net, inputs))
    done = run_command(*command)
    report = json.loads(Path("report.json").read_text())
    assert done.returncode == 0, done.stderr
    assert "The teacher against its owner's script" in done.stdout
    assert f"There is no cache {one_tile.cache.path}: only the teacher was compared." in done.stdout
    assert "PASS (reference): the teacher predicts what r holds of 1 tile\n" in done.stdout
    assert (report["passes"], report["cache_checked"], report["reference"]["passes"]) == (True, False, True)
    assert report["reference"]["tiles"][0]["max_abs"]["value"] < 1e-5

    Path(one_tile.cache.path).mkdir()
    (Path(one_tile.cache.path) / "begun").touch()
    np.save("r/t.npy", own.logits(net, inputs[..., ::-1]))
    done = run_command(*command)
    report = json.loads(Path("report.json").read_text())
    assert done.returncode == 1
    assert [finding["code"] for finding in report["findings"]] == ["incomplete", "reference"]
    assert report["reference"]["causes"][0]["remedies"] == ["set data.bands: [3, 2, 1]"]
    assert f"2 findings in {one_tile.cache.path}:" in done.stdout
    assert "the script feeds BGR: set data.bands: [3, 2, 1]; then the largest |Δp| falls from" in done.stdout


def test_a_finished_cache_is_checked_and_the_teacher_compared(cached, teacher_file, tmp_path):
    from kdpipe.pipeline.reports.html.verify import write_verification

    image = next(Path(cached.data.train[0], "images").iterdir())
    folder = tmp_path / "scores"
    folder.mkdir()
    saved(folder, own.softmax(own.logits(own.network(teacher_file), own.pixels(image) / 255)), f"{image.stem}.npy")
    report = verify(cached, "quick", CPU, reference=folder)
    assert report.passes
    assert report.cache_checked
    assert report.fingerprint is not None
    assert str(list(verify_tables(report))[-1]).startswith("PASS (quick): 6 tiles")
    write_verification(report, cached, [], tmp_path / "page.html")
    assert f"Against the scores in {folder}" in (tmp_path / "page.html").read_text()


@pytest.mark.long
def test_the_real_teacher_predicts_what_its_own_script_does(dubai, tmp_path, monkeypatch):
    """One crop of a real tile as a PNG, once right and once with ImageNet's normalisation."""
    import segmentation_models_pytorch as smp

    monkeypatch.chdir(tmp_path)
    root = link_tiles(dubai, tmp_path / "links", "Train", ["t1_002"])
    with Image.open(root / "images/t1_002.jpg") as tile:
        crop = tile.crop((100, 100, 260, 230))
    Path("Mine/images").mkdir(parents=True)
    crop.save("Mine/images/t.png")
    weights = dubai / "pretrain_weights/u-efficientnet-b4_s0_CELoss_pretrained.pth"
    config = load_config(
        "dubai/linknet_kd",
        [f"data.train=[{tmp_path}/Mine]", "data.val=[]", "data.unlabelled=[]", "data.allow_missing_masks=true",
         f"teacher.checkpoint={weights}"],
    )  # fmt: skip
    net = smp.Unet("efficientnet-b4", encoder_weights=None, classes=8)
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()
    Path("r").mkdir()
    inputs = np.asarray(crop, dtype=np.float32) / 255
    np.save("r/t.npy", own.logits(net, inputs))
    report = verify(config, "full", CPU, reference=Path("r"))
    assert report.passes, report.findings
    np.save("r/t.npy", own.logits(net, (inputs - own.IMAGENET_MEAN) / own.IMAGENET_STD))
    report = verify(config, "full", CPU, reference=Path("r"))
    assert "set teacher.normalize: imagenet; then the largest |Δp| falls from" in report.findings[0].message
