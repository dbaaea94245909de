"""Students without branches on sizes, and compiled; test_export.py tests exported graphs."""

import numpy as np
import pytest
import torch

from kdpipe.pipeline.models.swin import parts
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer, _extended


def student(name):
    torch.manual_seed(0)
    if name == "ftunetformer":
        return FTUNetFormer(6, width=32, heads=4, embed_dim=16, depths=(1, 1, 2, 1), encoder_heads=(1, 1, 2, 2))
    return UNetFormer(6, encoder="test_resnet", width=32, heads=4)  # timm's smallest: a fifth less to trace


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (4, 8), (5, 9), (8, 8), (9, 16)])
@pytest.mark.parametrize("more", [(0, 0), (1, 0), (0, 1), (7, 4), (3, 7), (1, 1)])
def test_maps_are_mirrored_where_that_fits_and_repeat_their_border_elsewhere(size, more):
    x = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
    expected = x
    for axis, below in enumerate(more):
        width = [(0, 0)] * 4
        width[2 + axis] = (0, below)
        expected = np.pad(expected, width, mode="reflect" if below < size[axis] else "edge")
    found = _extended(torch.from_numpy(x), size[0] + more[0], size[1] + more[1])
    np.testing.assert_array_equal(found.numpy(), expected)


def test_parts_are_rounded_up():
    assert [parts(size, 7) for size in (1, 6, 7, 8, 14, 15)] == [1, 1, 1, 2, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("name", ["ftunetformer", "unetformer"])
def test_a_compiled_student_has_the_outputs_and_gradients_of_the_eager_one(name):
    """
    One graph without a break (`fullgraph`), backward included, run operator by operator.

    Inductor's kernels are left to torch's tests: a C++ compiler may be absent, and takes minutes. So does `dynamic=True`; crops
    all have one size.
    """
    x = torch.randn(2, 3, 45, 72)
    results = []
    for compiled in (False, True):
        model = student(name).train()
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
        torch.manual_seed(1)
        outputs = run(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *(parameter.grad for parameter in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)
