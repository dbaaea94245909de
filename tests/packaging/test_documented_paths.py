"""Paths that the docs name can be imported, and planning stage one does not import torch."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "path",
    [
        "kdpipe.cache.SoftTargetCache",
        "kdpipe.pipeline.losses.distillation_loss",
        "kdpipe.pipeline.models.student.build_student",
        "kdpipe.pipeline.precompute.precompute",
        "kdpipe.pipeline.verify.verify",
        "kdpipe.pipeline.training.train",
    ],
)
def test_a_documented_path_can_be_imported(path):
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert callable(found) and found.__name__ == name
    assert name in getattr(importlib.import_module(module), "__all__", [name])


@pytest.mark.parametrize("room", ["precompute", "training", "verify"])
def test_a_room_has_no_other_lazy_name(room):
    with pytest.raises(AttributeError, match=f"module 'kdpipe.pipeline.{room}' has no attribute 'absent'"):
        importlib.import_module(f"kdpipe.pipeline.{room}").absent  # noqa: B018


@pytest.mark.long
def test_rooms_and_the_plan_of_stage_one_are_imported_without_torch():
    names = ("precompute.plan", "precompute", "training", "verify", "runs.layout", "runs.curves")
    modules = ", ".join(f"kdpipe.pipeline.{name}" for name in names)
    loaded = f"import sys, {modules}; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
