"""`train.batch_size: auto` finds the largest batch that fits, and changes nothing else."""

import ctypes
import gc
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers.doubles import Lines, Plain
from helpers.out_of_memory import CUDA, LIMITED, PLAIN_MALLOC
from helpers.runs import assert_same_weights, checkpoint, weights

from kdpipe.configs import dump_config, load_config
from kdpipe.configs.errors import ConfigError, OutOfMemory
from kdpipe.pipeline.training import batch_size
from kdpipe.pipeline.training.batch_size import available_bytes, largest_batch, resolve_batch_size
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")


@pytest.fixture
def limit_batch(monkeypatch):
    """A function that makes trial students run out of memory above a batch size, and returns the list of sizes tried."""
    tried = []

    def limit(most, err=CUDA):
        def build(*args, **options):
            student = Plain()

            def refuse(module, inputs):
                if inputs[0].is_meta:  # a trial without values
                    return
                tried.append(len(inputs[0]))
                if len(inputs[0]) > most:
                    raise err

            student.register_forward_pre_hook(refuse)
            return student

        monkeypatch.setattr(batch_size, "untrained_student", build)
        monkeypatch.setattr(batch_size.gc, "collect", lambda: None)  # these students hold no cycles
        return tried

    return limit


@pytest.fixture
def auto(make_config):
    def make(effective=6, **changes):
        return make_config(train__batch_size="auto", train__effective_batch_size=effective, **changes)

    return make


@pytest.mark.parametrize(("most", "chosen"), [(6, 6), (5, 3), (3, 3), (2, 2), (1, 1)])
def test_the_largest_divisor_that_fits_is_accumulated_to_exactly_the_effective_size(auto, limit_batch, most, chosen):
    limit_batch(most)
    lines = Lines()
    resolved = resolve_batch_size(auto(), CPU, lines).train
    assert (resolved.batch_size, resolved.accumulate, resolved.samples_per_step) == (chosen, 6 // chosen, 6)
    assert re.search(
        rf"^train\.batch_size auto: {chosen} samples? at a time x {6 // chosen} accumulated = 6 a step", lines.said[0]
    )
    assert ("was out of memory" in lines.said[0]) == (most < 6)


@pytest.mark.parametrize("err", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_the_cpus_own_errors_count_as_not_fitting(auto, limit_batch, err):
    limit_batch(2, err)
    assert largest_batch(auto(), CPU)[0] == 2


def test_other_errors_of_the_student_are_not_taken_for_a_lack_of_memory(auto, limit_batch):
    limit_batch(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        largest_batch(auto(), CPU)


def test_if_no_batch_fits_the_keys_are_named(auto, limit_batch):
    limit_batch(0)
    message = (
        r"of the divisors of 6 \(train\.effective_batch_size\) none fits with crops of 64 x 64 px on cpu\. To fit: "
        r"train\.crop: 32 \(now 64\)"
    )
    with pytest.raises(OutOfMemory, match=message):
        largest_batch(auto(), CPU)


def test_a_batch_of_one_is_skipped_where_batch_norm_needs_two(auto, monkeypatch):
    """DeepLabV3 normalises after pooling to one pixel: a single sample has no deviation."""
    monkeypatch.setattr(batch_size, "available_bytes", lambda: 0)  # nothing larger than the smallest is tried
    config = auto(student={"architecture": "deeplabv3", "encoder": "resnet18"})
    with pytest.raises(ConfigError, match="cannot train on one image of 64 x 64 px; set train.batch_size to 2 or more"):
        batch_size.take_steps(config, CPU, 1, 2)
    tried = []
    monkeypatch.setattr(
        batch_size, "_forecast", lambda config, device, sizes, room: tried.extend(sizes) or (lambda size: 0)
    )
    monkeypatch.setattr(batch_size, "_fits", lambda config, device, size: size == 2)
    assert largest_batch(config, CPU)[0] == 2
    assert tried == [6, 3, 2]


def test_on_the_cpu_no_batch_is_tried_that_would_not_fit_by_measurement(auto, limit_batch, monkeypatch):
    """Two small sizes are measured and the rest extrapolated: here 0.5 GB per sample, of 80 % of 5 GB."""
    tried = limit_batch(99)
    held = iter([10**9, 1.5 * 10**9, 2 * 10**9])  # before, with one, with two

    class Process:
        def memory_info(self):
            return type("Info", (), {"rss": next(held)})

    class Watched:
        def __enter__(self):
            return lambda: self.most

        def __init__(self):
            self.most = next(held)

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(batch_size.psutil, "Process", Process)
    monkeypatch.setattr(batch_size, "_watched", Watched)
    monkeypatch.setattr(batch_size, "available_bytes", lambda: 5 * 10**9)
    size, why = largest_batch(auto(effective=16), CPU)
    assert size == 8  # 0.5 GB x 8 is 4 GB
    assert why == "; 16 would take about 8 GB of 4 GB"
    assert set(tried) == {1, 2, 8}


def return_freed_memory():
    """Return to the system what malloc keeps of earlier tests: steps that reuse it do not make the process grow."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)(0)


@pytest.mark.long
def test_measured_peaks_grow_with_the_batch_as_tensors_do(auto):
    """Real steps with crops of 256 px: larger batches take more, and the forecast is within a factor of two."""
    config = auto(effective=4, train__crop=256)
    sizes = [4, 2, 1]
    return_freed_memory()
    forecast = batch_size._forecast(config, CPU, sizes, room=1e12)
    return_freed_memory()
    before = batch_size.psutil.Process().memory_info().rss
    with batch_size._watched() as largest:
        batch_size.take_steps(config, CPU, 4, 2)
    assert forecast(4) > forecast(2) > forecast(1) > 0
    assert 0.5 < forecast(4) / (largest() - before) < 2


def test_available_memory_is_what_the_tightest_limit_leaves(tmp_path):
    folder = tmp_path / "sys" / "job" / "step"
    folder.mkdir(parents=True)
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    machine = available_bytes(tmp_path / "sys", own)
    assert machine > 10**8
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text("1\n")
    assert available_bytes(tmp_path / "sys", own) == pytest.approx(machine, rel=0.5)
    (folder.parent / "memory.max").write_text("100000000\n")
    (folder.parent / "memory.current").write_text("70000000\n")
    (folder.parent / "memory.stat").write_text("anon 60000000\ninactive_file 10000000\n")
    assert available_bytes(tmp_path / "sys", own) == 40_000_000


@pytest.fixture
def cached(cached, auto):
    return auto(effective=4)


def test_the_trial_changes_nothing_in_the_run(cached, make_config, limit_batch, small_student):
    """Bit for bit the run of a config with the same sizes, batch norm's running statistics included."""
    limit_batch(2)
    found = train(cached, CPU)
    said = make_config(name="said", train__batch_size=2, train__accumulate=2)
    assert train(said, CPU).losses == found.losses
    assert_same_weights(weights(), weights("said"))


def test_resuming_takes_the_recorded_sizes_and_tries_nothing(cached, auto, limit_batch, small_student):
    limit_batch(2)
    train(auto(effective=4, train__max_steps=1), CPU)
    recorded = yaml.safe_load(checkpoint()["kdpipe"]["config"])
    beside = load_config("model_weights/tests/tiny/config.yaml").train
    for sizes in (recorded["train"], beside.model_dump()):
        assert (sizes["batch_size"], sizes["accumulate"], sizes["effective_batch_size"]) == (2, 2, 4)
    tried = limit_batch(99)  # a larger machine
    tried.clear()
    lines = Lines()
    assert train(cached, CPU, resume=True, progress=lines).steps == 2
    assert tried == []
    assert "train.batch_size auto: 2 x 2 accumulated, as in the run that is resumed" in lines.said
    message = r"steps of 4 samples \(train\.batch_size 2 x train\.accumulate 2\).* is now 6"
    with pytest.raises(ConfigError, match=message):
        train(auto(effective=6), CPU, resume=True)


@pytest.mark.long
def test_an_auxiliary_head_and_lookahead_are_tried_too(auto):
    config = auto(effective=2, student={"architecture": "unetformer", "encoder": "resnet18"}, train__lookahead=True)
    assert largest_batch(config, CPU)[0] == 2


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the address space in use is read from Linux's /proc")
def test_a_process_that_may_not_grow_accumulates_and_finishes(cached, make_config, tmp_path):
    """A real limit: six crops of 320 px do not fit into 80 % of 1.25 GB more, fewer at a time do."""
    config = make_config(train__batch_size=6, train__crop=320, train__epochs=1, data__val=[])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    arguments = ["train-student", "-c", "c.yaml", "--device", "cpu", "--set", "train.batch_size=auto"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "1250", *arguments], capture_output=True, text=True, check=False, timeout=300,
        env=PLAIN_MALLOC,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"train\.batch_size auto: (\d) samples? at a time x (\d) accumulated = 6 a step", done.stdout)
    assert found, done.stdout
    assert int(found[1]) < 6
    assert np.multiply(*map(int, found.groups())) == 6
