"""The table of the benchmarks names missed targets, and each benchmark runs on the smallest data it takes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import run_command

SCRIPTS = Path(__file__).parent


@pytest.fixture(scope="module")
def bench():
    """`run.py` as a module."""
    spec = importlib.util.spec_from_file_location("bench_run", SCRIPTS / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def a_way(bytes_per_pixel):
    return {"bytes_per_pixel": bytes_per_pixel}


FOUND = {
    "startup": {"more": {"--help": 0.1, "--set with a wrong key": 0.6}},
    "stage_one": {"of_bare": 1.2, "of_prepared": 0.9, "of_naive": 1.5},
    "steps": {
        "of": {"none": {"cached": 1.02}, "cached": {"online": 1.96, "online, d4": 3.92}},
        "gflop": {"student": 44.4, "teacher": 37.0},
    },
    "steps_small": {
        "of": {"none": {"cached": 1.05}, "cached": {"online": 1.9, "online, d4": 4.76}},
        "gflop": {"student": 15.6, "teacher": 37.0},
    },
    "recipes": {"of": {"cached": {"none": 0.98, "cached": 1.0, "cached, averaged": 1.01, "cached, cutmix": 1.1}}},
    "many_tiles": {"commands": {"precompute-teacher, nothing to do": {"100": {"seconds": 2.0}, "10000": {"seconds": 3.2}}}},
    "size": {
        temperature: {
            "ways": {"8 bits: cache.bits 8": a_way(0.7), "6 bits: cache.bits 6": a_way(0.4)},
            "reads": {
                "8": {"zarr_median_ms": 20.0, "kdpipe_median_ms": 5.0, "pack_median_ms": 5.2},
                "6": {"zarr_median_ms": zarr_ms, "kdpipe_median_ms": 5.0, "pack_median_ms": zarr_ms / 5},
            },
        }
        for temperature, zarr_ms in (("1", 30.0), ("2", 19.0))
    },
    "memory": {"tiles_mb": {"8": 1000.0, "32": 900.0, "128": 1050.0}, "high_against_first": 1.3, "wide_against_first": 1.2},
    "remote": {
        "figures": {
            way: {
                "crops of a folder, one reader, a second": pace, "crops of a folder, 7 readers, a second": pace * pace,
                "receipts at once, a second": 1500.0, "receipts one after another, a second": 30.0,
            }
            for way, pace in (("obstore", 19.0), ("s3fs", 10.0))
        }
    },
    "peers": {
        "ways": {
            way: {"bytes_per_pixel": size, "of_kdpipe": {"1 core, cold": cold, "1 core, warm": 1.1}}
            for way, size, cold in (("kdpipe", 0.7, 1.0), ("memmap", 6.0, 0.4), ("tensorstore", 0.6, 1.2))
        }
    },
    "open_index": {"tiles": 1_000_000, "bytes_a_tile": 132.0, "seconds": 0.7, "cpu_seconds": 0.7, "private_mb": 9.0},
    "demo_gain": {"miou": {"with": {"42": 0.6, "43": 0.5}, "without": {"42": 0.6, "43": 0.45}}, "gain": 2.5},
    "views": {
        "figures": {view: {"seconds": 1.0, "bytes": 5, "step_seconds": 2.0} for view in ("tile", "crop", "none")},
        "options": {"views": 8},
    },
}  # fmt: skip
MISSED = [
    "kdpipe --set with a wrong key: CPU time beyond importing click and pydantic",
    "stage one against that loop with the network as kdpipe prepares it, tiles/s",
    "online step against cached, student of 44 GFLOP, teacher with TTA d4",
    "cached step against one without distillation, student of 16 GFLOP",
    "cached step with cutmix against one without",
    "nothing to do, 10,000 tiles, the whole command",
    "crop from a pack against one from the folder, 6 bits, T 1",
    "random crop of up to 512 px against zarr-python's defaults, 6 bits, T 2",
    "peak memory of a scene four times as high, in windows",
    "crops from S3 through obstore against s3fs, one reader",
    "receipts of 1,000,000 tiles from S3, at this pace",
    "random crops from kdpipe against memmap, 1 core, cold",
    "bytes of kdpipe against tensorstore, equal values",
    "index",
    "mIoU that the demo's student gains, mean of 2 seeds",
]


def test_each_target_is_a_number_that_is_compared(bench):
    rows = {row.what: row for row in bench.rows(FOUND)}
    assert [what for what, row in rows.items() if row.met is False] == MISSED
    assert rows["peak memory of 128 tiles against 8"].cells()[1:] == ("1.050 x", "<= 1.1 x", "yes")
    assert rows["peak memory of a scene four times as high, in windows"].cells()[1:] == ("1.300 x", "<= 1.1 x", "no")
    assert rows["nothing to do, 100 tiles"].cells()[1:] == ("2.000 s", "", "")
    reads = [what for what in rows if what.startswith("random crop of")]
    assert len(reads) == 4 and all("up to 512 px" in what for what in reads)
    assert rows["receipts from S3 at once against one after another"].reached == 50
    assert rows["cached step with averaged against one without"].met
    assert bench.Row("", float("nan"), at_most=1).met is False


def written(folder, name, content, code=0):
    """The commands of a fake benchmark that writes `content` and exits with `code`."""
    script = folder / f"{name}.py"
    script.write_text(f"import sys\nopen(sys.argv[-1], 'w').write({json.dumps(content)!r})\nsys.exit({code})\n")
    return [["-I", "-S", str(script)]]


@pytest.mark.parametrize("check", [False, True])
def test_what_is_missed_is_shown_and_with_check_an_exit_code(bench, tmp_path, monkeypatch, capsys, check):
    known = {name: written(tmp_path, name, FOUND[name]) for name in ("stage_one", "memory")}
    monkeypatch.setattr(bench, "benchmarks", lambda config, folder: known)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "demo", "--out", str(tmp_path / "out"), *(["--check"] if check else [])]
    )
    if check:
        with pytest.raises(SystemExit, match=r"missed: stage one against that loop.*; peak memory of a scene") as ended:
            bench.main()
        assert isinstance(ended.value.code, str)  # which is printed, and the code is 1
    else:
        bench.main()
    table = capsys.readouterr().out
    assert [line.split("│")[4].strip() for line in table.splitlines() if line.startswith("│")] == [
        "yes",
        "no",
        "yes",
        "yes",
        "no",
        "",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["met"] for row in summary["rows"]] == [True, False, True, True, False, None] and summary["failed"] == []
    assert summary["rows"][1] | {"at_least": 0.95, "reached": 0.9} == summary["rows"][1]


def test_a_benchmark_that_fails_is_named_and_the_others_run_all_the_same(bench, tmp_path, monkeypatch, capsys):
    fails = written(tmp_path, "fails", {}, code=3)
    known = {
        "steps": [*fails, *written(tmp_path, "steps", FOUND["steps"])],
        "memory": written(tmp_path, "memory", FOUND["memory"]),
    }
    monkeypatch.setattr(bench, "benchmarks", lambda config, folder: known)
    (tmp_path / "steps.json").write_text("{}")  # of an earlier run, which is not this one's
    monkeypatch.setattr(sys, "argv", ["run.py", "demo", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="ended with an error, see above: steps$"):
        bench.main()
    assert "peak memory of 128 tiles against 8" in capsys.readouterr().out


def test_many_tiles_takes_over_what_a_killed_run_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from many_tiles import MARK, claim

    lock = claim(tmp_path / "many")
    (tmp_path / "many" / "100" / "Many").mkdir(parents=True)
    with pytest.raises(SystemExit, match="another run is at work"):
        claim(tmp_path / "many")
    assert (tmp_path / "many" / "100" / "Many").is_dir()
    lock.close()  # as the kernel does for a process that is killed
    claim(tmp_path / "many").close()
    assert [path.name for path in (tmp_path / "many").iterdir()] == [MARK]
    other = tmp_path / "other"
    (other / "100").mkdir(parents=True)
    with pytest.raises(SystemExit, match="none of this benchmark's"):
        claim(other)
    assert (other / "100").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_benchmark_runs_and_its_figures_fit_into_the_table(bench, landscape, teacher_file, tmp_path):
    overrides = bench.settings([
        f"data.train=[{landscape / 'Train'}]", f"data.val=[{landscape / 'Val'}]", "data.unlabelled=[]",
        f"cache.path={tmp_path / 'cache.zarr'}",
        f"teacher.encoder={teacher_file.stem}", f"teacher.checkpoint={teacher_file}", "train.crop=64", "train.batch_size=2",
    ])  # fmt: skip
    small_student = bench.settings(bench.STUDENTS["steps_small"])
    # It has sizes in the module and no options for them.
    small = "memory.TILES, memory.SCENES_PX = (1, 2), ((300, 300), (600, 300), (300, 600))"
    memory = f"import memory, sys; {small}; sys.argv[0] = 'memory.py'; memory.main()"
    commands = {
        "startup": ["startup.py", "--rounds", "1"],
        "stage_one": ["stage_one.py", "demo", "--tiles", "2", "--rounds", "1", "--device", "cpu", *overrides],
        "size": ["size.py", "demo", "--tiles", "2", "--temperature", "1", "2", *overrides],
        "steps": ["steps.py", "demo", "--d4", "--steps", "2", "--rounds", "1", *overrides],
        "steps_small": ["steps.py", "demo", "--d4", "--steps", "2", "--rounds", "1", *overrides, *small_student],
        "recipes": ["steps.py", "demo", "--recipes", "--steps", "2", "--rounds", "1", *overrides, *small_student],
        "memory": ["-c", memory],
        "many_tiles": ["many_tiles.py", tmp_path / "many", "--tiles", "200", "--missing", "1", "2"],
        "open_index": ["open_index.py", tmp_path / "index", "--tiles", "5000"],
        "peers": ["peers.py", tmp_path / "peers", "demo", "--tiles", "16", "--rounds", "1", *overrides],
        "views": ["views.py", "demo", "--tiles", "2", "--views", "2", "--steps", "2", *overrides],
    }
    assert {*commands, "remote", "demo_gain"} == set(bench.benchmarks("demo", tmp_path))  # these two take minutes
    assert run_command("precompute-teacher", "-c", "demo", "--device", "cpu", *overrides).returncode == 0
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    found = {}
    for name, (first, *arguments) in commands.items():
        script = [first] if first == "-c" else [SCRIPTS / first]
        file = tmp_path / f"{name}.json"
        done = subprocess.run(
            [sys.executable, *script, *arguments, "--json", file], env=environment, capture_output=True, text=True, cwd=tmp_path
        )  # fmt: skip
        assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
        found[name] = json.loads(file.read_text())
    where = [
        SCRIPTS / "where.py",
        "demo",
        "--tiles",
        "2",
        "--steps",
        "2",
        *overrides,
        "--json",
        tmp_path / "where.json",
    ]
    done = subprocess.run([sys.executable, *where], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [*json.loads((tmp_path / "where.json").read_text())] == ["a tile", "a step"]
    classes = [SCRIPTS / "classes.py", "demo", "--tiles", "1", "--classes", "6", "21", *overrides]
    classes += ["--json", tmp_path / "classes.json"]
    done = subprocess.run([sys.executable, *classes], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "classes.json").read_text())["21"]["8"]["moved_most"] <= 0.02 + 1e-6
    assert not (tmp_path / "many").exists()
    rows = bench.rows(found)
    assert len(rows) == 28 and all(row.reached == row.reached for row in rows)
    for content in found["size"].values():
        for name, way in content["ways"].items():
            assert way["max_error"] <= way["bound"], name


@pytest.mark.slow
def test_the_benchmark_of_a_cluster_runs(tmp_path):
    pytest.importorskip("distributed")
    done = subprocess.run(
        [sys.executable, SCRIPTS / "cluster.py", "2"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["one process", "1 workers", "2 workers"]
