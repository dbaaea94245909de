"""
Networks exported to one file: ONNX (run by onnxruntime) and torch.export's `.pt2`. No code and no pickle of a file is run.

`torch.export.load` would unpickle some parts of an archive, load compiled libraries, and evaluate the text of symbolic sizes.
`_refuse_code` therefore reads the archive first and accepts only plain tensors, torch's own operators and arithmetic.
"""

from __future__ import annotations

import importlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, ConfigError, extra_text
from kdpipe.configs.files import file_sha256
from kdpipe.pipeline.models.container import check_archive
from kdpipe.pipeline.models.external.onnx_file import require_onnxruntime, require_runs
from kdpipe.pipeline.models.external.outputs import logits_in

EXPORT = """\
import torch
model = torch.jit.load({path!r}, map_location="cpu").eval()  # a compiled program: only if you trust where it came from
example = torch.zeros(1, 3, 512, 512)
torch.onnx.export(model, (example,), {target!r}, input_names=["image"], output_names=["logits"], dynamo=False,
                  dynamic_axes={{"image": {{0: "n", 2: "h", 3: "w"}}, "logits": {{0: "n", 2: "h", 3: "w"}}}})
"""
# Members of a torch.export archive that hold no code, below its one folder.
PLAIN_MEMBERS = re.compile(
    r"(models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/.*|archive_format|archive_version|byteorder|version|\.data/(serialization_id|version))"
)
OPERATORS = re.compile(
    r"torch\.ops\.[\w.]+|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|index)"
)
# The size of a dimension, as sympy writes it: no dots, brackets or strings but the names of symbols; only sympy's classes are called.
SYMBOL_NAME = re.compile(r"'[a-z]\w{0,20}'")
ARITHMETIC = re.compile(r"(?:[A-Z]\w*\(|\w+(?!\w*\()|[\s+\-*/(),<>=&|~])*")


class OnnxNetwork(nn.Module):
    """
    An ONNX network from normalised images, float32 `(N, B, H, W)`, to its first output, computed by onnxruntime.

    On a CUDA device onnxruntime computes there where it was installed for CUDA, and on the CPU otherwise.
    """

    def __init__(self, path: str, key: str) -> None:
        super().__init__()
        self._path = path
        self._key = key
        self._sessions: dict[str, Any] = {}
        self._input = self._checked_input()
        self.img_size = self._input.shape[2:]  # read by `limits.sizes.fixed_side`
        self.strict_img_size = all(isinstance(side, int) for side in self.img_size)

    def forward(self, images_NBHW: Tensor) -> Tensor:
        session = self._session(images_NBHW.device.type)
        self._refuse_other_sizes(images_NBHW)
        # A network that was exported for one image takes one at a time.
        at_once = self._input.shape[0] if isinstance(self._input.shape[0], int) else len(images_NBHW)
        images = images_NBHW.float().cpu().contiguous().numpy()
        batches = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        short = at_once - len(batches[-1])
        if short:
            batches[-1] = np.concatenate([batches[-1], np.zeros((short, *images.shape[1:]), np.float32)])
        try:
            found = [session.run(None, {self._input.name: batch})[0] for batch in batches]
        except Exception as err:  # onnxruntime's errors have no common class of their own
            raise _refused(self._key, self._path, images_NBHW, self._input.shape, err) from err
        return torch.from_numpy(np.concatenate(found)[: len(images)]).to(images_NBHW.device)

    @property
    def input_shape(self) -> Sequence[Any]:
        """`(N, bands, H, W)`; sizes that may vary are no whole numbers."""
        shape: Sequence[Any] = self._input.shape
        return shape

    @property
    def channels(self) -> int | None:
        """C of its logits; None if the file does not say."""
        shape = self._session("cpu").get_outputs()[0].shape
        return shape[1] if len(shape) == 4 and isinstance(shape[1], int) else None

    def _checked_input(self) -> Any:
        inputs = self._session("cpu").get_inputs()
        fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4
        if not fits:
            told = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
            raise CheckpointError(
                f"{_at(self._key)}{self._path} should have one input, float32 images (N, bands, H, W), normalised outside the "
                f"network; found {told or 'none'}"
            )
        return inputs[0]

    def _session(self, device: str) -> Any:
        if device not in self._sessions:
            onnxruntime = require_onnxruntime()
            wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
            providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # errors are raised, and told once
            options.intra_op_num_threads = torch.get_num_threads()
            try:
                self._sessions[device] = onnxruntime.InferenceSession(self._path, options, providers=providers)
            except Exception as err:  # onnxruntime's errors have no common class of their own
                raise CheckpointError(
                    f"{_at(self._key)}{self._path} is not an ONNX network that onnxruntime can run: {_first(err)}"
                ) from err
        return self._sessions[device]

    def _refuse_other_sizes(self, images_NBHW: Tensor) -> None:
        named = ("bands", "rows", "columns")
        for what, wanted, found in zip(named, self._input.shape[1:], images_NBHW.shape[1:], strict=True):
            if isinstance(wanted, int) and wanted != found:
                advice = (
                    f"the file has {wanted}: choose as many in {self._key or 'student'}.bands" if what == "bands"
                    else _size_advice(self._key, self._input.shape[2:])
                )  # fmt: skip
                raise ConfigError(f"{_at(self._key)}{self._path} cannot predict an image of {found} {what}; {advice}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # it is never changed, and onnxruntime's sessions cannot be copied


def _refused(key: str, path: str, images_NBHW: Tensor, exported_for: Sequence[Any], err: Exception) -> ConfigError:
    """For a network that fails at a batch."""
    return ConfigError(
        f"{_at(key)}{path} cannot predict images of the shape {tuple(images_NBHW.shape)}: {_first(err)}; it was exported for "
        f"{tuple(map(str, exported_for))}; {_size_advice(key, tuple(exported_for)[2:])}"
    )


class ExportedNetwork(nn.Module):
    """A network of torch.export from normalised images, float32 `(N, B, H, W)`, to what it returns."""

    def __init__(self, path: str, key: str) -> None:
        super().__init__()
        _refuse_code(path, key)
        try:
            program = torch.export.load(path)
            self.network = program.module()
        except Exception as err:  # whatever a damaged archive makes it stumble on
            raise CheckpointError(f"{_at(key)}torch.export cannot load {path}: {_first(err)}") from err
        self._key, self._path = key, path
        self.input_shape = _input_shape(program)
        self.channels = _channels(program)
        self.img_size = self.input_shape[2:]  # read by `limits.sizes.fixed_side`
        self.strict_img_size = all(isinstance(side, int) for side in self.img_size)

    def forward(self, images_NBHW: Tensor) -> Any:
        # A network that was exported for one image takes one at a time.
        one_by_one = isinstance(self.input_shape[0], int) and self.input_shape[0] != len(images_NBHW)
        try:
            if not one_by_one:
                return self.network(images_NBHW)
            found = [self.network(image[None]) for image in images_NBHW]
        except Exception as err:
            raise _refused(self._key, self._path, images_NBHW, self.input_shape, err) from err
        return torch.cat([logits_in(each, self._key or self._path) for each in found])

    def train(self, mode: bool = True) -> Self:
        return self  # exported in the mode that it stays in


def load_exported(path: str, key: str) -> nn.Module:
    """
    The network of an `.onnx` or `.pt2` file, which returns logits `(N, C, h, w)`.

    Raises `CheckpointError`, which names `key`, for other files, for damaged ones, and for archives that would run code; for
    TorchScript the message ends with the lines of Python that export it anew.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{_at(key)}no file at {file.absolute()}; relative paths start at the current folder")
    if file.suffix == ".onnx":
        digests(path, key)  # refuses weights that are missing or outside its folder
        try:
            require_runs(file)
        except CheckpointError as err:
            raise CheckpointError(f"{_at(key)}{err}") from err
        return OnnxNetwork(path, key)
    if _is_torchscript(file):
        lines = EXPORT.format(path=path, target=str(file.with_suffix(".onnx")))
        raise CheckpointError(
            f"{_at(key)}{path} is TorchScript, a compiled program. Export it to ONNX where it can do no harm, and name that file:\n\n"
            + "\n".join(f"    {line}" for line in lines.splitlines())
        )
    if file.suffix == ".pt2":
        return ExportedNetwork(path, key)
    if not key:
        raise CheckpointError(f"{path} is no readable .onnx or .pt2 file (torch.export)")
    raise CheckpointError(
        f"{key}.file takes .onnx and .pt2 (torch.export), found {file.name}; weights alone go under {key}.checkpoint, with "
        f"{key}.architecture or {key}.model"
    )


def digests(path: str, key: str) -> dict[str, str]:
    """The sha256 of an exported file and, for ONNX, of the files beside it that hold its weights, by name."""
    file = Path(path)
    names = [file.name, *(_external_data(file, key) if file.suffix == ".onnx" else ())]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{_at(key)}{path} needs the file {missing[0]} beside it, which is not there")
    return {name: file_sha256(str(file.parent / name)) for name in names}


def _external_data(file: Path, key: str) -> list[str]:
    """Names of the files beside an ONNX file that hold its tensors; raises `CheckpointError` for one outside its folder."""
    try:
        onnx: Any = importlib.import_module("onnx")
    except ImportError as err:
        raise ConfigError(f"{_at(key)}an ONNX file needs the package onnx; {extra_text('export')}") from err
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as err:  # protobuf's errors, and whatever else damage leads to
        raise CheckpointError(f"{_at(key)}{file} is not a readable ONNX file: {_first(err)}") from err
    helper: Any = importlib.import_module("onnx.external_data_helper")
    used = [each for each in helper._get_all_tensors(model) if helper.uses_external_data(each)]
    names = sorted({entry.value for each in used for entry in each.external_data if entry.key == "location"})
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise CheckpointError(f"{_at(key)}{file} keeps weights outside its folder, in {outside[0]}")
    return names


def _refuse_code(path: str, key: str) -> None:
    """Raise `CheckpointError` where loading an archive of torch.export could run code that the file brings."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(Path(path), archive)  # torch reads the very records that are examined here
            bad = _first_code(archive)
    except CheckpointError as err:
        raise CheckpointError(f"{_at(key)}{err}") from err
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, RecursionError, RuntimeError, EOFError) as err:
        raise CheckpointError(
            f"{_at(key)}{path} is not a readable archive of torch.export: {type(err).__name__}: {_first(err)}"
        ) from err
    if bad:
        raise CheckpointError(
            f"{_at(key)}{path} holds {bad}, and kdpipe runs no code and no pickle from a file. Export the network to ONNX"
        )


def _first_code(archive: zipfile.ZipFile) -> str | None:
    """What in an archive could run code; None where there is nothing."""
    for member in archive.namelist():
        inner = member.partition("/")[2]
        if not member.endswith("/") and not PLAIN_MEMBERS.fullmatch(inner):
            return f"{member}, which is not plain data"
        if inner == "data/sample_inputs/model.pt":
            try:
                with archive.open(member) as file:
                    torch.load(file, weights_only=True)
            except Exception as err:  # torch raises whatever a pickle makes it stumble on
                return f"a pickle that is not plain tensors in {member} ({type(err).__name__})"
        if inner.endswith(".json"):
            for name, value in _pairs(json.loads(archive.read(member))):
                if name == "use_pickle" and value:
                    return f"a pickle in {member}"
                if name == "target" and isinstance(value, str) and not OPERATORS.fullmatch(value):
                    return f"a call of {value[:80]}"
                if name == "expr_str" and isinstance(value, str) and not _is_arithmetic(value):
                    return f"the expression {value[:80]!r}"
    return None


def _is_arithmetic(expression: str) -> bool:
    bare = SYMBOL_NAME.sub("s", expression)
    return "__" not in bare and ARITHMETIC.fullmatch(bare) is not None


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """All names in a JSON document with their values."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield name, value
            yield from _pairs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _pairs(value)


def _input_shape(program: Any) -> tuple[Any, ...]:
    """The shape that a program was exported for; dimensions that may vary are not whole numbers."""
    (name, *_) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    return tuple(node.meta["val"].shape)


def _channels(program: Any) -> int | None:
    """C of a program's logits; None if it returns several tensors or does not say."""
    outputs = next(node for node in program.graph.nodes if node.op == "output").args[0]
    shapes_of = [node.meta["val"].shape for node in outputs if "val" in getattr(node, "meta", {})]
    return (
        shapes_of[0][1] if len(shapes_of) == 1 and len(shapes_of[0]) == 4 and isinstance(shapes_of[0][1], int) else None
    )


def _size_advice(key: str, sizes: tuple[Any, ...] | list[Any]) -> str:
    fixed = [size for size in sizes if isinstance(size, int)]
    if len(set(fixed)) == 1 and len(fixed) == 2 and fixed[0] % 32 == 0:
        window = f"{key}.window:" if key else "--window"
        return f"set {window} {fixed[0]}, or export it for any size"
    return "export it for any number of rows and columns"


def _at(key: str) -> str:
    """The beginning of an error about `file` in the section `key`; empty for a file that a command names."""
    return f"{key}.file: " if key else ""


def _is_torchscript(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith(("/code/__torch__.py", "/constants.pkl")) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _first(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else "no reason given"


def shapes(path: str) -> tuple[list[int | str], int | None]:
    """The shape of a readable file's input `(N, bands, H, W)`, sizes that may vary as words, and its number of channels if it is fixed."""
    network = load_exported(path, "teacher")
    if isinstance(network, OnnxNetwork):
        return [each if isinstance(each, int) else str(each) for each in network.input_shape], network.channels
    assert isinstance(network, ExportedNetwork)
    return [each if isinstance(each, int) else str(each) for each in network.input_shape], network.channels
