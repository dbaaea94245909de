"""Maps are whole or absent, memory stays flat, and the command reports what it wrote."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.files import noise, read_raster, write_scene
from helpers.map_process import first_band, predictor

from kdpipe.configs.errors import ConfigError, DataError, Interrupted, KdpipeError
from kdpipe.data.maps import Layer, new_map
from kdpipe.data.scenes import Georeference
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.prediction import cutting
from kdpipe.pipeline.prediction.maps import predict

MAP_PROCESS = str(Path(__file__).parents[1] / "helpers/map_process.py")


def test_ctrl_c_keeps_finished_maps_and_leaves_no_partial_one(tmp_path):
    stop, batches = threading.Event(), []
    scenes = [str(write_scene(tmp_path / f"{name}.tif", noise(300, 40))) for name in "ab"]

    def logits(images):
        batches.append(1)
        if len(batches) == 7:  # a window of the second scene
            stop.set()
        return first_band(images)

    with pytest.raises(Interrupted, match=r"stopped in .*b\.tif, which has no map yet; 1 of 2 scenes have their map"):
        predict(predictor(logits), scenes, tmp_path / "out", window=96, overlap=32, stop=stop)
    assert sorted(os.listdir(tmp_path / "out")) == ["a.tif", "a.tif.aux.xml"]


@pytest.mark.long
def test_a_killed_run_leaves_no_map_and_the_next_run_writes_it(tmp_path):
    """kill -9 in the middle of a scene."""
    write_scene(tmp_path / "a.tif", noise(2000, 64))
    process = subprocess.Popen(
        [sys.executable, MAP_PROCESS, "kill", "a.tif"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.listdir(tmp_path / "out") == [".a.tif.partial"]
    predict(predictor(), [str(tmp_path / "a.tif")], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.tif", "a.tif.aux.xml"]
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "a.tif")[0], read_raster(tmp_path / "a.tif")[0] % 3)


def test_two_processes_do_not_write_one_map(tmp_path):
    layer = Layer(["class"], "uint8", 255, "mode")
    with (
        new_map(tmp_path / "a.tif", layer, 8, 8, Georeference()) as writer,
        pytest.raises(DataError, match=r"another process is writing .*\.a\.tif\.partial"),
        new_map(tmp_path / "a.tif", layer, 8, 8, Georeference()),
    ):
        pass
    assert writer is not None


@pytest.fixture
def file_limit():
    """Sets the largest size of a file in bytes, which stands for a full disk; None is no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.long
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, file_limit):
    """GDAL fails when it writes a block, or, at the last four limits, closes the file without an error."""
    scene = write_scene(tmp_path / "scene.tif", noise(600, 600))
    whole = predict(predictor(), [str(scene)], tmp_path / "whole")
    size = Path(whole.maps[0].files["classes"]).stat().st_size
    for limit in (1000, size // 2, size - 4000, size - 500, size - 100, size - 1):
        file_limit(limit)
        with pytest.raises(
            KdpipeError, match=r"cannot write the map .*out/scene\.tif: .*; check free space and permissions"
        ):
            predict(predictor(), [str(scene)], tmp_path / "out")
        file_limit(None)
        assert os.listdir(tmp_path / "out") == []


def test_an_out_folder_that_cannot_be_written_is_an_error(tmp_path):
    scene = write_scene(tmp_path / "a.tif", noise(40, 40))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file/maps cannot be made"):
        predict(predictor(), [str(scene)], tmp_path / "file" / "maps")


@pytest.mark.long
def test_memory_does_not_grow_with_a_scenes_height(tmp_path):
    """The peak memory of a process that maps a scene of 1000 px width, then one four times as high."""
    for height in (1000, 4000):
        write_scene(tmp_path / f"{height}.tif", np.ones((3, height, 1000), np.uint8), tiled=True, compress="deflate")
    command = [sys.executable, MAP_PROCESS, "memory", "1000.tif", "4000.tif"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    small, large = map(float, said.split())
    # All of the image and its logits would be 3000 rows x 1000 px x (3 + 12) bytes = 43 MB more.
    assert large - small < 20, said


def test_out_of_memory_names_the_options_that_help(tmp_path):
    def logits(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scene = write_scene(tmp_path / "a.tif", noise(40, 40))
    with pytest.raises(
        KdpipeError, match=r"1 window of 40 x 40 px.*--batch-size 1; --window 512 \(now 1024\); --device cpu"
    ):
        predict(predictor(logits), [str(scene)], tmp_path / "out")


def test_the_command_writes_maps_and_json_and_names_failures(trained, landscape, tmp_path):
    (tmp_path / "in").mkdir()
    tiles = sorted((landscape / "Val" / "images").iterdir())
    (tmp_path / "in" / "bad.tif").write_text("no raster")
    done = run_command(
        "predict", *tiles, tmp_path / "in", "--checkpoint", trained, "--out", tmp_path / "maps", "--json", tmp_path / "a.json",
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 1
    assert "kdpipe: cannot read" in done.stderr
    assert "bad.tif" in done.stderr
    assert "Area by class" in done.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["maps"]) == len(tiles)
    assert list(content["failed"]) == [str(tmp_path / "in" / "bad.tif")]
    for drawn in content["maps"]:
        found = read_raster(drawn["files"]["classes"])[0]
        assert found.shape == (drawn["height"], drawn["width"])
        assert sum(drawn["pixels"].values()) == found.size
    # Nothing was written beside the tiles.
    assert sorted((landscape / "Val" / "images").iterdir()) == tiles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "none.ckpt", "--out", "m", "."], "no checkpoint at"),
        (["--checkpoint", "none.onnx", "--out", "m", "."], "no file at"),
        (
            ["--checkpoint", "a.pt2", "--out", "m", "."],
            "a.pt2 does not say what its classes, bands and normalisation are: add -c CONFIG",
        ),
        (["--checkpoint", "x", "--out", "m"], "Missing argument 'INPUT...'"),
        (["--checkpoint", "x", "."], "Missing option '--out'"),
    ],
)
def test_mistakes_end_in_one_paragraph(arguments, message, tmp_path):
    done = run_command("predict", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_help_names_the_default_size_of_windows():
    said = {option.name: getattr(option, "help", None) for option in cli.commands["predict"].params}
    assert f"Default: {cutting.WINDOW_PX}," in said["window"]
    assert f"Default: {cutting.OVERLAP_PX}," in said["overlap"]
