"""The suggested class map: counts as in NumPy, rows that sum to one, and a section that can be pasted."""

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import run_command
from helpers.dubai import link_tiles
from helpers.reference_teacher import teacher_logits
from PIL import Image
from rich.console import Console

from kdpipe.configs import dump_config, load_config
from kdpipe.configs.errors import DataError
from kdpipe.data.rasters import read_image
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.reports.terminal.verify import suggestion_tables
from kdpipe.pipeline.verify.class_map import Suggestion, suggest_map, suggested_rows

CPU = torch.device("cpu")


def pasted(config, suggestion, tmp_path):
    """The configuration with the suggested section in place of its own."""
    text = dump_config(config)
    own = re.search(r"^class_map:\n(?: .*\n)+", text, flags=re.MULTILINE)[0]
    (tmp_path / "pasted.yaml").write_text(text.replace(own, suggestion.as_yaml() + "\n"))
    return load_config(tmp_path / "pasted.yaml")


def counts_of(config, rows):
    """Counts `(S, T)` from `{teacher class: {label: pixels}}`."""
    counts = np.zeros((len(config.classes.names), len(config.teacher_classes)), dtype=np.int64)
    for name, row in rows.items():
        for label, pixels in row.items():
            counts[config.classes.names.index(label), config.teacher_classes.index(name)] = pixels
    return counts


def test_counts_are_those_of_numpy_over_labelled_pixels(make_config, landscape, teacher_file, tmp_path):
    shutil.copytree(landscape / "Train", tmp_path / "Copy")
    config = make_config(data__train=[str(tmp_path / "Copy")])
    tiles = list_tiles(config.data, "train")
    mask = np.array(Image.open(tiles[0].mask))
    mask[:20] = 255
    Image.fromarray(mask).save(tiles[0].mask)
    suggestion = suggest_map(config, CPU)

    expected = np.zeros((6, 8), dtype=int)
    for tile in list_tiles(config.data, "train"):
        logits = teacher_logits(teacher_file, read_image(tile.image))
        labels = np.array(Image.open(tile.mask))
        np.add.at(expected, (labels[labels != 255], logits.argmax(dim=0).numpy()[labels != 255]), 1)
    found = np.array([list(row.counts.values()) for row in suggestion.rows]).T
    # A pixel on the edge of two classes may differ: the teacher computes in another memory layout.
    assert np.abs(found - expected).sum() <= 4
    assert suggestion.pixels == expected.sum() == found.sum()
    assert suggestion.tiles == len(tiles) == 6
    assert [row.pixels for row in suggestion.rows] == found.sum(axis=0).tolist()


def test_the_section_can_be_pasted(make_config, tmp_path):
    config = make_config()
    suggestion = suggest_map(config, CPU, sample=2)
    assert suggestion.tiles == 2
    assert suggest_map(config, CPU, sample=2) == suggestion
    loaded = pasted(config, suggestion, tmp_path)
    assert loaded.class_map == {row.teacher_class: row.suggested for row in suggestion.rows}


def test_rows_are_hundredths_that_sum_to_one_without_rare_shares():
    config = load_config("dubai/linknet_kd")
    rng = np.random.default_rng(0)
    counts = np.floor(rng.dirichlet(np.full(6, 0.4), size=8).T * 10_000_019).astype(int)
    for row in suggested_rows(counts, config):
        hundredths = [round(100 * share) for share in row.suggested.values()]
        assert sum(hundredths) == 100
        assert hundredths == sorted(hundredths, reverse=True)
        assert all(share == h / 100 for share, h in zip(row.suggested.values(), hundredths, strict=True))
        shares = {name: n / row.pixels for name, n in row.counts.items()}
        assert set(row.suggested) == {name for name, share in shares.items() if share >= 0.05}
        scaled = {name: shares[name] / sum(shares[n] for n in row.suggested) for name in row.suggested}
        assert all(abs(row.suggested[name] - scaled[name]) < 0.01 for name in scaled)


def test_a_hand_worked_row():
    config = load_config("dubai/linknet_kd")
    counts = counts_of(config, {"Tree": {"Forest": 660, "Settlement": 200, "SemiNatural": 100, "Background": 40}})
    tree = suggested_rows(counts, config)[0]
    # Without the 4 %: 660, 200 and 100 of 960 are 68.75, 20.83 and 10.42 %.
    assert tree.suggested == {"Forest": 0.69, "Settlement": 0.21, "SemiNatural": 0.1}
    assert (tree.pixels, tree.kept, tree.disagrees) == (1000, False, False)


def test_rare_and_absent_classes_keep_their_configured_row(tmp_path):
    config = load_config("dubai/linknet_kd", ["class_map.Cropland={Cropland: 0.123, Grassland: 0.877, Forest: 0}"])
    counts = counts_of(config, {"Tree": {"Forest": 100_000}, "Road": {"Forest": 480}, "Bareland": {"Forest": 520}})
    rows = {row.teacher_class: row for row in suggested_rows(counts, config)}
    assert rows["Road"].kept
    assert rows["Road"].suggested == {"Settlement": 1}
    assert not rows["Bareland"].kept
    assert rows["Bareland"].suggested == {"Forest": 1}
    assert rows["Bareland"].disagrees
    assert not rows["Road"].disagrees
    assert rows["Cropland"].suggested == {"Cropland": 0.123, "Grassland": 0.877}


def test_permuted_channels_are_corrected():
    config = load_config("dubai/linknet_kd")
    names, order = config.teacher_classes, [3, 0, 5, 1, 6, 2, 7, 4]
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 300, (6, 8))
    for place, true in enumerate(order):  # channel `place` is what is called names[true]
        counts[config.class_map_matrix()[true].argmax(), place] += 10_000
    for row, true in zip(suggested_rows(counts, config), order, strict=True):
        assert row.suggested == {max(config.class_map[names[true]], key=config.class_map[names[true]].get): 1}


def test_names_that_yaml_would_read_otherwise_are_quoted(make_config, tmp_path):
    names = ["no", "Forest: old", "#3", "null", "Settlement", "Semi, natural"]
    classes = ["Tree", "yes", "Crop: land", "Developed", "{Road}", "Bareland", "Water", "Ödland"]
    config = make_config(
        classes__names=names, teacher__classes=classes, class_map={name: {"null": 1} for name in classes}
    )
    counts = np.random.default_rng(0).integers(1000, 9000, (6, 8))
    suggestion = Suggestion(suggested_rows(counts, config), tiles=1, pixels=int(counts.sum()))
    assert set(pasted(config, suggestion, tmp_path).class_map) == set(classes)


def test_tiles_without_labels_and_masks_of_another_size_are_refused(make_config, tmp_path):
    root = tmp_path / "Bare"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(root / "images" / "a.png")
    config = make_config(data__train=[str(root)], data__allow_missing_masks=True)
    with pytest.raises(DataError, match=r"from labelled tiles, and data\.train has none: .*Bare; put masks into"):
        suggest_map(config, CPU)
    Image.fromarray(np.full((40, 50), 255, np.uint8)).save(root / "masks" / "a.png")
    with pytest.raises(DataError, match=r"masks of 1 tile hold nothing but classes\.ignore_index \(255\)"):
        suggest_map(config, CPU)
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(root / "masks" / "a.png")
    with pytest.raises(DataError, match=r"the mask .*a\.png is 50 x 40 px, but its image .*a\.png is 40 x 50"):
        suggest_map(config, CPU)


def test_the_tables_fit_eighty_columns_and_explain_the_rows():
    config = load_config("dubai/linknet_kd")
    counts = counts_of(
        config,
        {
            "Tree": dict.fromkeys(config.classes.names, 12_345_678),
            "Water": {"Forest": 9_000_000, "Background": 1},
            "Road": {"Settlement": 5},
        },
    )
    console = Console(width=80, record=True, file=io.StringIO())
    suggestion = Suggestion(suggested_rows(counts, config), tiles=3, pixels=int(counts.sum()))
    table, *texts = suggestion_tables(suggestion)
    console.print(table)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "Forest 100 !" in shown
    assert "74,074,068" in shown
    said = "\n".join(texts)
    assert "Shares below 0.05 are dropped" in said
    assert "on less than 0.5 % of the pixels keep their configured row" in said
    assert max(map(len, said.partition("class_map:")[0].splitlines())) <= 80
    assert "most labels are of another class" in said
    assert "  Road: {Settlement: 1}  # as configured: too few pixels" in said
    assert yaml.safe_load(suggestion.as_yaml())["class_map"]["Water"] == {"Forest": 1}


def test_the_command_prints_the_section_and_writes_json(make_config, tmp_path):
    config = make_config()
    (tmp_path / "c.yaml").write_text(dump_config(config))
    done = run_command("suggest-map", "-c", "c.yaml", "--sample", "1", "--json", "s.json")
    assert done.returncode == 0, done.stderr
    section = yaml.safe_load(done.stdout[done.stdout.index("class_map:") :])["class_map"]
    written = json.loads((tmp_path / "s.json").read_text())
    assert section == {row["teacher_class"]: row["suggested"] for row in written["rows"]}
    assert sum(row["pixels"] for row in written["rows"]) == written["pixels"]
    assert written["tiles"] == 1


@pytest.mark.long
def test_the_labels_suggest_the_real_map(dubai, tmp_path):
    root = link_tiles(dubai, tmp_path, "Train", ("t1_002", "t1_006"))
    checkpoint = dubai / "pretrain_weights" / "u-efficientnet-b4_s0_CELoss_pretrained.pth"
    config = load_config(
        "dubai/linknet_kd", [f"data.train=[{root}]", "data.val=[]", f"teacher.checkpoint={checkpoint}"]
    )
    rows = {row.teacher_class: row for row in suggest_map(config, CPU).rows}
    judged = {name: max(row.suggested, key=row.suggested.get) for name, row in rows.items() if not row.kept}
    assert len(judged) >= 4
    assert judged == {name: max(row.configured, key=row.configured.get) for name, row in rows.items() if not row.kept}
    assert all(rows[name].kept for name in ("Rangeland", "Cropland"))
