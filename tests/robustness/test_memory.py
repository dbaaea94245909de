"""Every way to run out of memory ends in one paragraph that names the keys to change."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.out_of_memory import CUDA, LIMITED, PLAIN_MALLOC, Exhausted
from torch._utils import ExceptionWrapper

from kdpipe.configs import dump_config
from kdpipe.configs.errors import CorruptCache, DataError, KdpipeError, OutOfMemory
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.memory import (
    fits_in_memory,
    is_out_of_memory,
    sized,
    teacher_advice,
    training_advice,
    validation_advice,
)
from kdpipe.pipeline.precompute import batches, subjects
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.frozen import FrozenTeacher
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.loaders import _worker_options
from kdpipe.pipeline.training.loop import Logs
from kdpipe.pipeline.training.run import train, with_mode
from kdpipe.pipeline.verify import gate as verify

CPU = torch.device("cpu")

CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MPS = RuntimeError(
    "MPS backend out of memory (MPS allocated: 17.99 GB, other allocations: 160.00 KB, max allowed: 18.13 GB). "
    "Tried to allocate 256.00 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit."
)
ACCELERATOR = RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


@pytest.mark.parametrize(
    ("err", "figures"),
    [
        (CUDA, r" \(2\.00 GiB more were requested; 1\.20 GiB of 23\.68 GiB were free\)"),
        (CPU_ALLOCATOR, r" \(4000000000000 bytes more were requested\)"),
        (MPS, r" \(256\.00 MB more were requested\)"),
        (ACCELERATOR, ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (RuntimeError("std::bad_alloc"), ""),
        (RuntimeError("could not create a primitive"), ""),
        (MemoryError(), ""),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_way_of_running_out_is_said_in_one_paragraph(err, figures):
    with (
        pytest.raises(
            OutOfMemory, match=rf"^out of memory while trying{figures}\. To fit: less; or nothing$"
        ) as caught,
        fits_in_memory("while trying", ["less", "or nothing"]),
    ):
        raise err
    assert caught.value.__cause__ is err
    assert "\n" not in str(caught.value)


def test_an_operation_that_onednn_does_not_know_is_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution forward"))


def test_numpys_own_error_is_one():
    with (
        pytest.raises(OutOfMemory, match=r"out of memory here \(7\.28 TiB more were requested\)"),
        fits_in_memory("here", ["x"]),
    ):
        np.empty((1000, 1000, 1000, 1000), dtype=np.float64)


def test_the_cpu_allocators_own_error_is_one():
    with (
        pytest.raises(OutOfMemory, match=r"out of memory here \(4000000000000000 bytes more"),
        fits_in_memory("here", ["x"]),
    ):
        torch.empty(10**15, dtype=torch.float32)


@pytest.mark.parametrize(
    "err",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "x"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
    ],
)
def test_other_errors_pass_as_they_are(err):
    with pytest.raises(type(err)) as caught, fits_in_memory("here", ["x"], workers=1):
        raise err
    assert caught.value is err


@pytest.mark.parametrize("err", [CUDA, CPU_ALLOCATOR, MPS, MemoryError()], ids=["cuda", "cpu", "mps", "python"])
def test_a_training_step_says_its_size_and_the_keys(cached, monkeypatch, err):
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: Exhausted(err))
    message = (
        r"out of memory while training on 2 crops of 64 x 64 px.*\. To fit: train\.batch_size: auto with "
        r"train\.effective_batch_size: 2 \(now 2; .*; train\.crop: 32 \(now 64\); train\.precision: bf16 \(now fp32\)"
    )
    with pytest.raises(OutOfMemory, match=message):
        train(cached, CPU)


@pytest.mark.long
def test_logs_that_cannot_be_closed_do_not_hide_what_ended_the_run(cached, monkeypatch):
    """TensorBoard's writer starts a thread, for which memory may be missing too."""

    def cannot_start(run):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Logs, "close", cannot_start)
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
        patch.setattr(training, "starting_student", lambda *args, **options: Exhausted(CPU_ALLOCATOR))
        train(cached, CPU)
    with pytest.raises(RuntimeError, match="new thread"):  # a finished run's logs are worth an error
        train(cached, CPU, overwrite=True)


def test_validation_says_the_tiles_and_val_batch_size(cached, monkeypatch):
    student = Exhausted(CUDA)
    student.training_too = False
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: student)
    message = r"while validating 1 tile of \d+ x \d+ px .* To fit: train\.val_batch_size: 1 \(now 4; --resume accepts the change\)"
    with pytest.raises(OutOfMemory, match=message):
        train(cached, CPU)


@pytest.fixture
def exhausted_teacher(monkeypatch):
    def answer(self, images):
        raise CUDA

    monkeypatch.setattr(FrozenTeacher, "logits", answer)


def test_precompute_says_the_tiles_and_the_teachers_keys(make_config, exhausted_teacher, monkeypatch):
    monkeypatch.setattr(batches, "ACCELERATOR_BATCH", 3)
    config = make_config(teacher__batch_size=3, teacher__scales=[1.0, 1.5])
    message = (
        r"while the teacher predicted \d tiles? of \d+ x \d+ px .* To fit: teacher\.batch_size: 1 \(now 3\); teacher\.scales without "
        r"those above 1 \(now \[1\.0, 1\.5\]; other values: another cache\.path\); smaller tiles$"
    )
    with pytest.raises(OutOfMemory, match=message):
        precompute(config, CPU)
    with pytest.raises(OutOfMemory, match=r"while the teacher predicted 1 tile of \d+ x \d+ px"):
        estimate(config, CPU)


def test_precompute_explains_memory_that_a_reader_lacks(make_config, monkeypatch):
    monkeypatch.setattr(subjects, "read_image", lambda *args: np.empty((10**6, 10**6, 10**6)))
    with pytest.raises(OutOfMemory, match=r"while precomputing .* teacher\.window: 512"):
        precompute(make_config(), CPU)


def test_online_says_that_cached_needs_no_teacher(cached, exhausted_teacher):
    with pytest.raises(OutOfMemory, match=r"beside the student .* To fit: distill\.mode: cached \(--kd cached\)"):
        train(with_mode(cached, "online"), CPU)


def test_parity_says_the_tile(cached, exhausted_teacher):
    with pytest.raises(OutOfMemory, match=r"while 1 tile of \d+ x \d+ px was compared with the teacher"):
        verify.verify(cached, "parity", CPU, sample=1)


def test_advice_names_what_there_is_to_lower(make_config):
    found = make_config(train={"batch_size": 2, "accumulate": 4, "effective_batch_size": 8, "crop": 32})
    assert training_advice(found, "bf16") == [
        "train.batch_size: 1 with train.accumulate: 8 (now 2 and 4)",
        "a smaller student.encoder or student.architecture",
    ]
    assert validation_advice(make_config(train={"val_batch_size": 1}), "bf16") == ["smaller tiles in data.val"]


@pytest.mark.parametrize(
    ("window", "side_px", "expected"),
    [(None, 4000, "512 (now whole tiles"), (None, 300, "256 (now whole tiles"), (1024, 4000, "512 (now 1024"),
     (512, 4000, "256 (now 512"), (None, None, "512 (now whole tiles"), (None, 256, None), (256, 4000, None)],
)  # fmt: skip
def test_a_teachers_window_is_advised_where_it_makes_the_pass_smaller(make_config, window, side_px, expected):
    advice = teacher_advice(make_config(teacher__window=window), 1, torch.device("cuda"), side_px)
    windows = [] if expected is None else [f"teacher.window: {expected}; other values: another cache.path)"]
    assert advice == [*windows, "--device cpu, if the machine has more memory than its GPU"]


def test_sizes_are_said_in_pixels():
    assert sized("crop", 4, 512, 256) == "4 crops of 512 x 256 px"


class Dying(torch.utils.data.Dataset):
    """Samples that kill the worker that reads them with a signal."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 4

    def __getitem__(self, k):
        os.kill(os.getpid(), self.number)


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, r"a worker of the data loader died \(killed by signal: Killed\), usually because the machine ran "
         r"out of memory .* To fit: train\.workers: 1 \(now 2; 0 reads in the main process"),
        (signal.SIGBUS, r"workers ran out of shared memory, /dev/shm.* train\.workers: 1 .*--shm-size=8g"),
    ],
    ids=["killed", "bus-error"],
)  # fmt: skip
def test_what_a_worker_dies_of_is_said(number, message):
    loader = torch.utils.data.DataLoader(Dying(number), batch_size=2, **_worker_options(1))
    with pytest.raises(OutOfMemory, match=message), fits_in_memory("while training", ["x"], workers=2):
        next(iter(loader))


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (lambda: np.empty((10**6, 10**6, 10**6)), OutOfMemory, r"^out of memory while training \(6\.94 EiB more .*\)\. To fit: x$"),
        (lambda: _raise(CorruptCache("tile a is damaged: its shard is not what was written")), CorruptCache,
         r"^tile a is damaged: its shard is not what was written$"),
        (lambda: _raise(DataError("cannot read a.png")), DataError, r"^cannot read a\.png$"),
    ],
    ids=["numpy", "corrupt", "data"],
)  # fmt: skip
def test_what_a_worker_raises_is_said_without_its_traceback(raised, kind, message):
    """torch passes a worker's exception to the main process as an `ExceptionWrapper`."""
    try:
        raised()
    except Exception:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(KdpipeError, match=message) as caught, fits_in_memory("while training", ["x"], workers=2):
        wrapped.reraise()
    assert type(caught.value) is kind


def _raise(err):
    raise err


# What a thread's arena reserves counts as address space and is never used: how much, chance and the allocator decide.


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the address space in use is read from Linux's /proc")
def test_a_process_that_may_not_grow_ends_with_the_paragraph_and_exit_code_1(cached, make_config, tmp_path):
    """torch itself raises: the process is allowed 700 MB more, and a step of six crops of 512 px needs gigabytes."""
    config = make_config(train__batch_size=6, train__crop=512)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    command = [sys.executable, "-c", LIMITED, "700", "train-student", "-c", "c.yaml", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=PLAIN_MALLOC)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(r"kdpipe: out of memory while training on 6 crops of 512 x 512 px", done.stderr), done.stderr
    assert "train.batch_size: auto with train.effective_batch_size: 6" in done.stderr
