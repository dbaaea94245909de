"""The commands as users meet them: order and speed of the help, options, one-paragraph errors, exit codes."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helpers.commands import run_command

from kdpipe.configs import dump_config
from kdpipe.data.landscape.labels import write_sample_data
from kdpipe.pipeline.commands.actions import setup
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.demo import STUDENTS


def run_process(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "kdpipe.pipeline", *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


TAKES = {  # in the order of the work, as `kdpipe --help` lists them
    "init": {"--json", "--debug", "--limit"},
    "inspect": {"--json", "--debug", "--set", "--limit"},
    "suggest-map": {"--json", "--debug", "--device", "--set", "--limit"},
    "sample-data": {"--json", "--debug"},
    "demo": {"--json", "--debug"},
    "completion": set(),
    "precompute-teacher": {"--json", "--debug", "--device", "--set", "--limit"},
    "verify-cache": {"--json", "--debug", "--device", "--set", "--limit"},
    "train-student": {"--json", "--debug", "--device", "--set", "--limit"},
    "evaluate": {"--json", "--debug", "--device", "--set", "--limit"},
    "forecast": {"--json", "--debug", "--device", "--set", "--limit"},
    "compare": {"--json", "--debug", "--device"},
    "report": {"--json", "--debug", "--device", "--limit"},
    "predict": {"--json", "--debug", "--device", "--set", "--limit"},
    "export": {"--json", "--debug", "--limit"},
    "pack": {"--json", "--debug"},
    "unpack": {"--json", "--debug"},
}


def test_each_command_takes_the_common_options_that_make_sense_for_it():
    common = set.union(*TAKES.values())
    taken = {
        name: common & {option for parameter in command.params for option in parameter.opts}
        for name, command in cli.commands.items()
    }
    assert taken == TAKES


def test_help_lists_the_commands_in_the_order_of_the_work_and_cuts_none_off(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = run_command("--help").stdout
    listed = [line.split()[0] for line in said.splitlines() if re.match("  [a-z][a-z-]*  ", line)]
    assert listed == list(TAKES) == cli.list_commands(None)
    assert [line for line in said.splitlines() if re.match(r"[A-Z].*:$", line)] == [
        "Options:", "Set up:", "The pipeline:", "Results:", "Maps:", "Caches:"
    ]  # fmt: skip
    assert "..." not in said.partition("Options:")[2]
    assert max(map(len, said.splitlines())) <= 80


def imports_none_of(heavy, commands, code, cwd=None):
    """One process that runs all of the commands, which end with this exit code, and then has none of `heavy` imported."""
    script = (
        "import sys\nfrom kdpipe.pipeline.commands.main import main\n"
        f"for arguments in {commands!r}:\n"
        "    sys.argv = ['kdpipe', *arguments]\n"
        "    try: main()\n    except SystemExit as end: ended = end.code or 0\n    else: ended = 0\n"
        f"    assert ended == {code}, (arguments, ended)\n"
        f"    assert not {heavy!r} & set(sys.modules), (arguments, {heavy!r} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def test_help_imports_nothing_heavy():
    commands = [["--help"], *([name, "--help"] for name in cli.commands)]
    heavy = {"torch", "numpy", "zarr", "pydantic", "rich", "lightning"}
    assert imports_none_of(heavy, commands, 0).stdout.count("Usage: kdpipe") == len(commands)


@pytest.mark.long
def test_a_refused_override_imports_nothing_to_compute_with(tmp_path):
    given = {
        "evaluate": ["--teacher"],
        "forecast": ["a.ckpt"],
        "predict": ["a.tif", "--checkpoint", "a.onnx", "--out", "maps"],
    }
    configured = [
        [name, *given.get(name, [])] for name, takes in TAKES.items() if "--set" in takes and name != "inspect"
    ]
    wrong = {"train.epoch=2": "did you mean train.epochs?", "train.epochs=many": "train.epochs: Input should be"}
    for override, message in wrong.items():
        commands = [[*command, "-c", "demo", "--set", override] for command in configured]
        said = imports_none_of({"torch", "numpy", "zarr", "rich", "lightning"}, commands, 2, cwd=tmp_path).stderr
        assert said.count(message) == len(commands), said


@pytest.mark.long
@pytest.mark.parametrize("command", [["precompute-teacher"], ["verify-cache", "--level", "quick"]], ids=" ".join)
def test_a_command_that_computes_nothing_imports_nothing_to_compute_with(command, cached, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(cached))
    code = (
        "import gc, sys; sys.argv = ['kdpipe', *%r, '-c', 'config.yaml', '--device', 'cpu']\n"
        "from kdpipe.pipeline.commands.main import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'segmentation_models_pytorch', 'timm', 'torchvision', 'lightning', 'torchmetrics', 'scipy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'torch' in sys.modules and gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()"
    ) % (command,)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("nothing to do|PASS", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["precompute-teacher"], 2, "Missing option '-c'"),
        (["precompute-teacher", "-c", "dubai/linknet_kdd"], 2, "did you mean dubai/linknet_kd?"),
        (
            ["precompute-teacher", "-c", "demo", "--set", "train.epoch=2"],
            2,
            "unknown key train.epoch; did you mean train.epochs?",
        ),
        (["precompute-teacher", "-c", "demo", "--set", "train.epochs=many"], 2, "train.epochs: "),
        (["precompute-teacher", "-c", "demo"], 2, "demo_output/data/Train"),
        (["train-student", "-c", "demo", "--kd", "offline"], 2, "'offline' is not one of"),
        (["verify-cache", "-c", "demo", "--level", "deep"], 2, "'deep' is not one of"),
        (["precompute-teacher", "-c", "demo", "--device", "nonsense"], 2, "--device nonsense cannot be used here"),
        (["precompute-teacher", "-c", "demo", "--dry-run", "--workers", "2"], 2, "exclude each other"),
        (["evaluate", "best.ckpt", "--set", "train.epochs=2"], 2, "--set overrides a key of -c CONFIG"),
        (["inspect", "best.ckpt", "--set", "train.epochs=2"], 2, "--set overrides a key of --diff CONFIG"),
        (["nonsense"], 2, "No such command 'nonsense'"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_their_exit_code(arguments, code, message, tmp_path):
    done = run_command(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    done = run_command("precompute-teacher", "-c", "demo", "--debug", cwd=tmp_path)
    assert "Traceback" in done.stderr


@pytest.mark.long
def test_the_real_process_ends_with_the_same_paragraph_and_exit_code(tmp_path):
    arguments = ("inspect", "gone.zarr", "--debug")
    done, here = run_process(*arguments, cwd=tmp_path), run_command(*arguments, cwd=tmp_path)
    assert done.stdout == here.stdout == ""
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == here.stderr.splitlines()[-1]
    assert done.returncode == here.returncode != 0


def test_version_is_the_packages():
    from importlib.metadata import version

    assert version("kdpipe") in run_process("--version").stdout


@pytest.mark.long
def test_sample_data_is_written_and_foreign_folders_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(write_sample_data.__kwdefaults__, "side", (65, 110))  # a tenth of the pixels to draw
    done = run_command("sample-data", "land", "--json", "land.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "land.json").read_text())["tiles"]["Train"] == 3
    assert len(list((tmp_path / "land" / "Train" / "images").iterdir())) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.txt").write_text("mine")
    done = run_command("sample-data", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "mine" / "photo.txt").read_text() == "mine"


def test_the_json_of_the_demo_holds_the_results_of_both_students(tmp_path, monkeypatch):
    def run_demo(out, progress):
        for label in STUDENTS:
            (out / f"{label}.json").write_text(json.dumps({"best_miou": len(label)}))
        yield "shown"

    monkeypatch.setattr(setup, "run_demo", run_demo)
    done = run_command("demo", "--out", ".", "--json", "demo.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "shown\n")
    assert json.loads((tmp_path / "demo.json").read_text()) == {"with": {"best_miou": 4}, "without": {"best_miou": 7}}


def test_a_cache_inside_a_package_is_refused(landscape, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "__init__.py").touch()
    (tmp_path / "demo_output").mkdir()
    (tmp_path / "demo_output" / "data").symlink_to(landscape)
    (tmp_path / "demo_output" / "teacher.pth").write_bytes(b"x")
    done = run_command("precompute-teacher", "-c", "demo", "--set", "cache.path=cache/soft.zarr", cwd=tmp_path)
    assert done.returncode == 2
    assert "lies in the Python package" in done.stderr
    assert os.listdir(tmp_path / "cache") == ["__init__.py"]


@pytest.mark.parametrize(
    "name", sorted(name for name, c in cli.commands.items() if any(p.name == "json_path" for p in c.params))
)
def test_a_json_file_that_cannot_be_written_is_refused_before_any_work(name, tmp_path):
    (tmp_path / "file").write_text("")
    needed = ["-c", "demo"] if any(p.name == "source" and p.required for p in cli.commands[name].params) else ["x"]
    done = run_command(name, *needed, "--json", "file/result.json", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert (
        "--json: writing file/result.json failed, as something else is there, such as a file in the place of a folder"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_every_action_that_a_command_names_is_a_function():
    sources = Path(setup.__file__).parents[1].glob("*.py")
    named = {name for source in sources for name in re.findall(r'\brun\(\s*"([\w.]+)"', source.read_text())}
    assert len(named) > 10
    for module, _, function in (name.partition(".") for name in named):
        assert callable(getattr(import_module(f"kdpipe.pipeline.commands.actions.{module}"), function)), (
            module,
            function,
        )
