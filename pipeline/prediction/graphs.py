"""
The ONNX graph of a student in the forms that are deployed: in half precision, in 8-bit integers, with classes as its output.

Each takes images float32, as the graph that it is made from, and returns logits float32, or classes uint8 after `with_classes`.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.os_errors import explained
from kdpipe.pipeline.models.external.onnx_file import CLASSES, INPUT, OUTPUT, SEAL_KEY, UNSEALED, seal

if TYPE_CHECKING:
    from onnx import ModelProto

    from kdpipe.pipeline.prediction.model import Card

CARD_KEY = "kdpipe"  # in the metadata of an ONNX file
MOST_CLASSES = 256  # that uint8 can tell apart
LAYERS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]  # with weights, but for the products of attention


def write_graph(model: ModelProto, card: Card, file: Path) -> None:
    """Write a graph with the card that describes it, and seal the file."""
    import onnx

    onnx.helper.set_model_props(model, {CARD_KEY: card.model_dump_json(), SEAL_KEY: UNSEALED})
    model.producer_name, model.producer_version = "kdpipe", card.kdpipe
    onnx.checker.check_model(model)
    with explained("writing", file):
        file.write_bytes(model.SerializeToString())
        seal(file)


def half(file: Path) -> ModelProto:
    """
    The graph with weights and activations in float16, and its input and output in float32.

    Numbers beyond float16's range, 65504, are clipped. The converter is onnxruntime's own; it leaves in float32 what has no kernel in
    float16 (`DEFAULT_OP_BLOCK_LIST`) and the scales of Resize. A CPU computes most layers in float32, with casts around them.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each clipped number
        convert: Any = convert_float_to_float16
        found: ModelProto = convert(onnx.load(str(file)), keep_io_types=True)
    sorted_model: Any = ONNXModel(found)
    sorted_model.topological_sort()  # the converter appends the casts of the input
    return found


def quantised(file: Path, inputs_1BHW: Sequence[NDArray[np.float32]]) -> ModelProto:
    """
    The graph with 8-bit weights and activations, calibrated on `inputs_1BHW`.

    Static quantisation of onnxruntime, in the form QDQ, which its CPU kernels are made for (since 1.11): activations uint8 in the range
    from their least to their largest value, weights int8 with a scale for each channel.

    The last layer stays in float32, as logits of 256 values would be tied. With attention or layer norms, all but the layers with weights
    stays so: 8 bits cost transformers much in softmax, norms, GELU and products of two activations, and save little. Measured on the
    Dubai tiles, with a LinkNet (RegNetX-200MF) and a U-Net (EfficientNet-B4): the class stays for 97.6 and 97.9 % of the pixels; for 97.0
    and 97.5 % with the layers alone in 8 bits. One scale for all channels of a layer costs the LinkNet 1.4 points of mIoU. Ranges by a
    moving average of the images keep 97.9 % in the LinkNet, and 95.1 % in the U-Net.
    """
    import onnx
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
    from onnxruntime.quantization.quantize import quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.waiting = iter(inputs_1BHW)

        def get_next(self) -> Any:  # None is the end, which the base class does not declare
            found = next(self.waiting, None)
            return None if found is None else {INPUT: found}

    with TemporaryDirectory(prefix="kdpipe-") as name, explained("writing", name), _quiet():
        source, target = Path(name, "float.onnx"), Path(name, "int8.onnx")
        shutil.copyfile(file, source)
        model = onnx.load(str(source))
        has_attention = any(node.op_type in ("Softmax", "LayerNormalization") for node in model.graph.node)
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=LAYERS if has_attention else None,  # None: all that it can
            nodes_to_exclude=_kept_in_float32(model),
        )
        found: ModelProto = onnx.load(str(target))
    return found


def with_classes(model: ModelProto) -> ModelProto:
    """The graph with one output, `classes`: uint8 `(N, H, W)`, the index of the largest logit, of equal ones the first."""
    from onnx import TensorProto, helper

    (output,) = (each for each in model.graph.output if each.name == OUTPUT)
    sides = [each.dim_param or each.dim_value for each in output.type.tensor_type.shape.dim]
    model.graph.node.append(helper.make_node("ArgMax", [OUTPUT], ["largest"], axis=1, keepdims=0))
    model.graph.node.append(helper.make_node("Cast", ["largest"], [CLASSES], to=TensorProto.UINT8))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(CLASSES, TensorProto.UINT8, [sides[0], *sides[2:]]))
    return model


def _kept_in_float32(model: ModelProto) -> list[str]:
    """The names of the products of two activations, and of the last layer; nodes are in the order of their computation."""
    constants = {each.name for each in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in LAYERS]
    products = [node.name for node in layers if node.op_type == "MatMul" and not constants & set(node.input)]
    return [*products, *(node.name for node in layers[-1:])]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the hints of onnxruntime's quantiser, which writes to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
