"""
Reads thousands of mutated files in a process of its own: `python -m helpers.mutation_runs FOLDER SEED COUNTS`.

FOLDER holds the valid files (`write_sources`), COUNTS is JSON such as `{"teacher": 100}`. Each case is drawn from the seed, its kind and
its number. A reader either succeeds or raises a `KdpipeError`; anything else is a failure, as are ten seconds of CPU time.
"""

import contextlib
import faulthandler
import functools
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

LIMIT_SECONDS, LIMIT_BYTES = 10, 2**30
WALL_SECONDS = 120  # on a machine that has other work
EXIT_CODES = (0, 2)  # of `kdpipe inspect`
TESTS = Path(__file__).resolve().parents[1]
RESIGNED = 5  # of so many mutated ONNX files one has its graph altered and its seal made right or removed; the others have damaged bytes


# Mutations of each kind, which docs/reliability.md names: of the slow test, of the default run, and of a real teacher.
NUMBERS = {"teacher": 3000, "student": 1500, "config": 5000, "onnx": 500}
SAMPLE = {"teacher": 120, "student": 80, "config": 100, "onnx": 15}
REAL = 100
REAL_NETWORK = {"encoder": "efficientnet-b4", "options": {}}
SMALL = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}  # options of a U-Net: files of some hundred kB


def write_sources(folder, make_config):
    """
    The valid files: a teacher in three formats, a student's checkpoint, its ONNX file, and a config.

    `make_config` makes the config of tests from overrides.
    """
    import safetensors.torch
    import torch

    from kdpipe.configs import dump_config
    from kdpipe.pipeline.models.smp import create_smp_model
    from kdpipe.pipeline.prediction.export import export_student

    config = make_config(
        teacher__options=SMALL, student__options=SMALL, teacher__checkpoint=str(folder / "teacher.pth")
    )
    (teacher,) = config.members.values()
    torch.manual_seed(0)
    model = create_smp_model(
        teacher.architecture, teacher.encoder, len(teacher.classes), key="teacher", options=teacher.options
    )
    state = model.state_dict()
    torch.save({"state_dict": state, "epoch": 3}, folder / "teacher.pth")
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "teacher.safetensors")
    write_student(folder / "last.ckpt", config)
    export_student(
        folder / "last.ckpt", "onnx", folder / "student.onnx", tiles=[str(Path(config.data.val[0]) / "images")]
    )
    (folder / "config.yaml").write_text(dump_config(config))


def write_student(path, config):
    """Write the checkpoint of a student with random weights and the state of an optimizer after a step."""
    import torch

    from kdpipe.configs import dump_config
    from kdpipe.pipeline.runs.checkpoint import save

    student, optimizer, scheduler = trainer(config)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    record = {"config": dump_config(config), "mode": "none", "fingerprint": None, "stretch": None, "libraries": {}}
    save(path, student, optimizer, scheduler, {}, _position(), record)


def run_mutations(folder, counts, seed=0):
    """The report of all cases: how many were tried, refused and read, the slowest, the most memory, and the failures by name."""
    total = {"tried": 0, "refused": 0, "read": 0, "slowest_s": 0.0, "peak_bytes": 0, "failures": {}}
    for kind, count in counts.items():
        first = 0
        paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        while first < count:
            at = folder / "at"
            at.unlink(missing_ok=True)
            command = [
                sys.executable,
                "-m",
                "helpers.mutation_runs",
                str(folder),
                str(seed),
                kind,
                str(first),
                str(count),
            ]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env=environment,
            )
            if done.returncode == 0:
                found, first = json.loads(done.stdout.splitlines()[-1]), count
            else:
                assert at.exists(), f"the valid {kind} is not read: {done.stderr}"
                case = int(at.read_text())
                failure = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
                found = {"tried": case - first + 1, "failures": {f"{kind} {case}": failure}}
                first = case + 1
            for key in ("tried", "refused", "read"):
                total[key] += found.get(key, 0)
            for key in ("slowest_s", "peak_bytes"):
                total[key] = max(total[key], found.get(key, 0))
            total["failures"] |= found["failures"]
    return total


def trainer(config):
    """A student of a config with random weights, its optimizer and its scheduler."""
    import torch

    from kdpipe.pipeline.models.student import build_student

    student = build_student(
        config.student.architecture,
        len(config.classes.names),
        encoder=config.student.encoder,
        options=config.student.options,
    )
    optimizer = torch.optim.AdamW(student.parameters())
    return student, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


def _position():
    from kdpipe.pipeline.runs.checkpoint import Position

    return Position(batches=2, steps=2, best_miou=0.25, best_step=2, history=({"step": 2, "miou": 0.25},))


class _Cases:
    """Makes and reads the mutated files of one kind."""

    def __init__(self, folder, seed):
        from kdpipe.configs import load_config

        self.folder, self.seed, self.canary = folder, seed, folder / "canary"
        self.config = load_config(folder / "config.yaml")

    def make(self, kind, number):
        """The path of a case's file."""
        from helpers import mutations

        rng = random.Random(f"{self.seed} {kind} {number}")
        if kind == "config":
            return self._write(
                "mutated.yaml", mutations.damaged_yaml((self.folder / "config.yaml").read_text(), rng, self.canary)
            )
        if kind == "onnx":
            return self._write("mutated.onnx", self._onnx(rng, number))
        if kind == "student" and rng.random() < 0.4:
            return self._student_saved_otherwise(rng)
        names = ["teacher.pth"] * 4 + ["legacy.pth", "teacher.safetensors"] if kind == "teacher" else ["last.ckpt"]
        source = self.folder / ("real.pth" if kind == "real" else rng.choice(names))
        data = source.read_bytes()
        if source.name in ("teacher.pth", "last.ckpt", "real.pth") and rng.random() < 0.7:
            return self._write(f"mutated{source.suffix}", mutations.damaged_archive(data, rng, self.canary))
        return self._write(f"mutated{source.suffix}", mutations.damaged(data, rng))

    def read(self, kind, path):
        """Raises what a reader raises; a `KdpipeError` is a refusal."""
        readers = {"config": self._read_config, "onnx": self._read_onnx, "student": self._read_student}
        if kind in readers:
            readers[kind](path)
        else:
            self._read_teacher(path, REAL_NETWORK if kind == "real" else {})

    def _write(self, name, data):
        path = self.folder / name
        path.write_bytes(data)
        return path

    def _onnx(self, rng, number):
        from helpers import mutations

        data = (self.folder / "student.onnx").read_bytes()
        if number % RESIGNED:
            return mutations.damaged(data, rng)
        import onnx

        from kdpipe.pipeline.models.external.onnx_file import SEAL_KEY, UNSEALED, seal

        model = mutations.altered_graph(onnx.load_from_string(data), rng)
        seals = [each for each in model.metadata_props if each.key == SEAL_KEY]
        if rng.random() < 0.5:
            model.metadata_props.remove(seals[0])
            return model.SerializeToString()
        seals[0].value = UNSEALED
        seal(self._write("sealed.onnx", model.SerializeToString()))
        return (self.folder / "sealed.onnx").read_bytes()

    def _student_saved_otherwise(self, rng):
        import torch
        from helpers import mutations

        content = torch.load(self.folder / "last.ckpt", weights_only=True)
        nested = [0]
        for _ in range(rng.choice([3, 200])):
            nested = [nested]
        shared = ["ha"]
        for _ in range(40):
            shared = [shared, shared]
        values = [None, True, -1, 2**63, 10**400, float("nan"), float("inf"), "", "x" * 10**5, [], {}, nested, shared, torch.zeros(3), b"x",
                  torch.zeros(()), torch.zeros(1).expand(2**30), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), 1j, {0: 1},
                  torch.full((2, 2), float("nan")), torch.zeros(2, dtype=torch.complex64), torch.zeros(2**20, 0, 3, 3)]  # fmt: skip
        if rng.random() < 0.4:
            config = mutations.damaged_yaml(content["kdpipe"]["config"], rng, self.canary)
            content["kdpipe"]["config"] = config.decode(errors="replace")
        else:
            # Mostly what the file says of itself, whose parts are few among hundreds of tensors.
            part = rng.choice(["kdpipe", "position", "optimizer", "scheduler", None])
            if part is None:
                content = mutations.altered(content, rng, values)
            else:
                content[part] = mutations.altered(content[part], rng, values)
        torch.save(content, self.folder / "mutated.ckpt")
        return self.folder / "mutated.ckpt"

    def _inspect(self, path):
        from helpers.commands import run_command

        done = run_command("inspect", path)
        if done.returncode not in EXIT_CODES:
            raise AssertionError(f"inspect ended with {done.returncode}: {done.stderr}")

    def _read_teacher(self, path, network):
        from kdpipe.pipeline.teacher.loading import load_teacher

        self._inspect(path)
        (teacher,) = self.config.members.values()
        load_teacher(teacher.model_copy(update={"checkpoint": str(path), **network}))

    def _read_student(self, path):
        from kdpipe.configs.errors import KdpipeError
        from kdpipe.pipeline.runs.checkpoint import load_trained, restore

        self._inspect(path)
        student, optimizer, scheduler = trainer(self.config)
        with contextlib.suppress(KdpipeError):
            load_trained(path)
        restore(path, self.config, None, student, optimizer, scheduler)

    def _read_onnx(self, path):
        import torch

        from kdpipe.pipeline.prediction.model import open_predictor

        open_predictor(path, "cpu").logits(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    def _read_config(self, path):
        from kdpipe.configs import load_config

        load_config(path)


def _main(folder, seed, kind, first, count):
    import segmentation_models_pytorch as smp

    from kdpipe.configs.errors import KdpipeError

    # Candidates are built once, not for each case: the same networks in a fraction of the time.
    smp.encoders.get_encoder = functools.lru_cache(maxsize=None)(smp.encoders.get_encoder)
    warnings.simplefilter("ignore")
    cases = _Cases(folder, seed)
    valid = {
        "teacher": "teacher.pth",
        "real": "real.pth",
        "student": "last.ckpt",
        "onnx": "student.onnx",
        "config": "config.yaml",
    }
    cases.read(kind, folder / valid[kind])  # also what is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"tried": 0, "refused": 0, "read": 0, "slowest_s": 0.0, "failures": {}}
    for number in range(first, count):
        (folder / "at").write_text(str(number))
        path = cases.make(kind, number)
        start = _cpu_seconds()
        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
        try:
            cases.read(kind, path)
            found["read"] += 1
        except KdpipeError as err:
            found["refused"] += 1
            if len(str(err)) > 6000 or path.name not in str(err):
                found["failures"][f"{kind} {number}"] = f"not told in a paragraph: {str(err)[:300]}"
        except BaseException as err:
            found["failures"][f"{kind} {number}"] = "".join(traceback.format_exception(err))[-3000:]
        faulthandler.cancel_dump_traceback_later()
        seconds = _cpu_seconds() - start
        found["tried"] += 1
        found["slowest_s"] = max(found["slowest_s"], round(seconds, 2))
        if seconds > LIMIT_SECONDS:
            found["failures"][f"{kind} {number}"] = f"took {seconds:.1f} s"
    found["peak_bytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if found["peak_bytes"] > LIMIT_BYTES:
        found["failures"][f"{kind} {first} to {count}"] = f"took {found['peak_bytes']} bytes"
    if cases.canary.exists():
        found["failures"][f"{kind} {first} to {count}"] = "executed code"
    print(json.dumps(found))


def _cpu_seconds():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    folder, seed, kind, first, count = sys.argv[1:]
    _main(Path(folder), int(seed), kind, int(first), int(count))
