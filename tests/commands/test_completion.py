"""Shells complete commands, configs, keys and their values, files and runs, fast and without side effects."""

import os
import shutil
import subprocess
import sys

import pytest

from kdpipe.configs import shipped_configs

BASH = shutil.which("bash")
FISH = shutil.which("fish")


@pytest.fixture
def place(tmp_path):
    """A working folder with a program called kdpipe, a config, tiles, weights and two runs."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kdpipe"
    program.write_text(f"#!{sys.executable}\nfrom kdpipe.pipeline.commands.main import main\nmain()\n")
    program.chmod(0o755)
    for path in ("mine.yaml", "mine.txt", "model_weights/g/a/run.json", "model_weights/g/a/best.ckpt", "model_weights/g/b/run.json",
                 "my tiles/images/1.png", "caches/soft.zarr/zarr.json", ".hidden/x.yaml", "student.onnx"):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def environment(place, **more):
    return {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "HOME": str(place), **more}


def in_bash(place, *lines):
    """Bash's candidates for each line with the cursor at its end, found as its readline finds them."""
    script = 'eval "$(kdpipe completion bash)"\ncompopt() { :; }\n' + "".join(
        f"COMP_LINE={line!r} COMP_POINT={len(line)}\n"
        "_kdpipe_completion kdpipe\n"
        'printf "%s|" "${COMPREPLY[@]}"; echo\n'
        for line in lines
    )
    done = subprocess.run(
        [BASH, "--norc", "-c", script], capture_output=True, text=True, check=True, cwd=place, env=environment(place)
    )
    assert not done.stderr
    return [[word for word in line.split("|") if word] for line in done.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_bash_completes_what_is_typed(place):
    cases = {
        "kdpipe pre": ["precompute-teacher", "predict"],
        "kdpipe train-student -c m": ["mine.yaml", "model_weights/", "my\\ tiles/"],
        "kdpipe train-student --set train.pr": ["train.precision="],
        # After `=` bash keeps the key, and appends the candidate.
        "kdpipe train-student --set train.precision=": ["auto", "fp32", "bf16", "fp16"],
        "kdpipe train-student --set train.precision=b": ["bf16"],
        "kdpipe train-student --set data.allow_missing_masks=": ["true", "false"],
        "kdpipe train-student --kd=o": ["online"],
        "kdpipe compare ": ["model_weights/g/a", "model_weights/g/b"],
        "kdpipe compare model_weights/g/a ": ["model_weights/g/b"],
        "kdpipe inspect model_weights/g/a/": ["model_weights/g/a/best.ckpt"],
        "kdpipe inspect caches/": ["caches/soft.zarr"],
        "kdpipe evaluate model_weights/g/a/": ["model_weights/g/a/best.ckpt"],
        "kdpipe evaluate model_weights/g/a/best.ckpt my": ["my\\ tiles/"],
        "kdpipe predict --checkpoint st": ["student.onnx"],
        "kdpipe init --teacher st": [],
        "kdpipe export --format ": ["onnx", "torchscript", "pt2"],
        "kdpipe predict --device c": ["cpu", "cuda", "cuda:0"],
        "kdpipe completion ": ["bash", "zsh", "fish"],
    }
    assert dict(zip(cases, in_bash(place, *cases), strict=True)) == cases


@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_shipped_configs_are_offered_by_the_names_that_are_loaded(place):
    (offered,) = in_bash(place, "kdpipe verify-cache -c ")
    assert [name for name in offered if not name.endswith(("/", "mine.yaml"))] == shipped_configs()


@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_bash_itself_calls_the_function_for_kdpipe(place):
    script = 'eval "$(kdpipe completion bash)"; complete -p kdpipe'
    done = subprocess.run(
        [BASH, "--norc", "-c", script], capture_output=True, text=True, check=True, env=environment(place)
    )
    assert done.stdout.split() == ["complete", "-o", "nosort", "-F", "_kdpipe_completion", "kdpipe"]


def completed(place, shell, words, **more):
    """The output of click's completion protocol, called as a shell's script calls it."""
    env = environment(place, _KDPIPE_COMPLETE=f"{shell}_complete", COMP_WORDS=words, **more)
    done = subprocess.run(["kdpipe"], capture_output=True, text=True, check=True, cwd=place, env=env)
    assert not done.stderr
    return done.stdout


def test_zsh_gets_whole_words(place):
    answer = completed(place, "zsh", "kdpipe train-student --set train.precision=b", COMP_CWORD="3")
    assert answer.split() == ["plain", "train.precision=bf16", "_"]


def test_zsh_puts_no_space_where_typing_goes_on(place):
    done = subprocess.run(
        ["kdpipe", "completion", "zsh"], capture_output=True, text=True, check=True, env=environment(place)
    )
    assert 'if [[ "$key" == *[=/] ]]; then compadd -U -S "" -- "$key"; else completions+=("$key"); fi' in done.stdout
    assert "compdef _kdpipe_completion kdpipe" in done.stdout


def test_fish_gets_its_candidates(place):
    assert completed(place, "fish", "kdpipe train-student -c dubai/", COMP_CWORD="dubai/").split() == [
        f"plain,{name}" for name in shipped_configs() if name.startswith("dubai/")
    ]


@pytest.mark.skipif(FISH is None, reason="no fish here; its protocol is tested above")
def test_fish_itself_completes(place):
    script = "kdpipe completion fish | source; complete -C 'kdpipe train-student --set train.precision=b'"
    done = subprocess.run(
        [FISH, "--no-config", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=place,
        env=environment(place),
    )
    assert done.stdout.split() == ["train.precision=bf16"]


def test_every_key_offered_is_one_of_the_configuration_and_every_choice_is_accepted():
    from kdpipe.configs import load_config
    from kdpipe.configs.schema.data import Split
    from kdpipe.pipeline.commands.completion import _keys

    config = load_config("demo")
    keys = _keys()
    assert {"name", "data.bands", "data.stretch", "teacher.normalize", "class_map", "train.lr"} <= keys.keys()
    no_network = [f"teacher.{name}=null" for name in ("architecture", "encoder", "checkpoint")]
    needed = {  # beside a key, or one of its values
        ("distill.teacher_view", "crop"): ["cache.views=7"],
        ("teacher.are", None): ["teacher.predictions=predicted", *no_network],
        ("student.normalize", "pretrained"): [
            "student.pretrained=a",
            "student.architecture=null",
            "student.encoder=null",
        ],
    }
    for key, choices in keys.items():
        value = config
        for part in key.split("."):
            value = value or Split()  # a section that is left out by default
            assert hasattr(value, part), key
            value = getattr(value, part)
        for choice in choices:
            load_config("demo", [f"{key}={choice}", *needed.get((key, choice), needed.get((key, None), []))])
    assert keys["teacher.tta"] == ["none", "flips", "d4"]
    assert keys["cache.bits"] == ["4", "6", "8", "16"]
    assert keys["teacher.normalize"] == ["unit", "imagenet"]


def test_completing_makes_no_folder_and_imports_nothing_heavy(place):
    code = (
        "import sys, os; sys.argv = ['kdpipe']\n"
        "from kdpipe.pipeline.commands.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'zarr', 'rich', 'lightning', 'rasterio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "keys = any('--set' in word for word in os.environ['COMP_WORDS'].split())\n"
        "assert keys or not {'pydantic', 'yaml'} & set(sys.modules)"
    )
    for words in (
        "kdpipe train-student -c du",
        "kdpipe inspect x --json new/folder/r.json --set tra",
        "kdpipe compare ",
    ):
        env = environment(place, _KDPIPE_COMPLETE="bash_complete", COMP_WORDS=words)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=place, env=env
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert not (place / "new").exists()


@pytest.mark.long
def test_nothing_there_to_complete_is_no_error(place):
    for words in (
        "kdpipe inspect absent/",
        "kdpipe inspect ~nobody/x",
        "kdpipe train-student --set nothing.at.all=",
        "kdpipe 'half",
    ):
        assert completed(place, "bash", words) in ("", "\n")


def test_every_option_for_a_file_or_a_config_completes():
    """Also those of a command added later."""
    from kdpipe.pipeline.commands.main import cli

    for command in cli.commands.values():
        for parameter in command.params:
            if {"CONFIG", "CHECKPOINT", "KEY=VALUE"} & {parameter.metavar} or parameter.name in (
                "checkpoint",
                "folders",
                "runs",
            ):
                assert parameter._custom_shell_complete is not None, (command.name, parameter.name)
