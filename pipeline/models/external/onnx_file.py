"""
ONNX files: opened, examined before they are run, and sealed so that damage is noticed.

onnxruntime notices no changed weight, and a graph may ask it for any memory, or end its process. So `kdpipe export` writes the file's own
digest into it, and a file is run on one small image in a process of its own, with limited memory, before it is run here.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.configs.errors import CheckpointError, ConfigError, extra_text
from kdpipe.configs.os_errors import explained

INPUT, OUTPUT = "images", "logits"
CLASSES = "classes"  # the output of a file that answers with class indices, uint8 `(N, H, W)`; its metadata say so
SEAL_KEY = "kdpipe_sha256"  # in the metadata: the sha256 of the file with zeros in its place
UNSEALED = "0" * 64
# Key and value lie side by side in the file, parted by the value's tag and length.
_SEAL = re.compile(SEAL_KEY.encode() + rb"\x12\x40(.{64})", re.DOTALL)
TRIAL_PX = 128  # PAN takes no smaller ones
TRIAL_SECONDS = 120
BYTES_PER_PX = 4096  # of the image that a network of one size is tried on: a large ViT's feature maps take about half
TRIAL_BYTES = 2**30  # beyond four times the file, which onnxruntime holds twice while it optimises the graph


def open_session(path: Path, providers: list[str]) -> Any:
    """
    An onnxruntime session of a file whose content is that of its seal, if it has one.

    Raises `CheckpointError` if the file cannot be read or was changed, `ConfigError` if onnxruntime is not installed.
    """
    runtime = require_onnxruntime()
    require_seal(path)
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and told once
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as err:  # onnxruntime's errors have no class in common
        raise CheckpointError(f"{path} is not a readable ONNX file: {first_line(err)}") from err


def require_onnxruntime() -> Any:
    """The module onnxruntime; raises `ConfigError` if it is not installed."""
    try:
        import onnxruntime
    except ImportError as err:
        raise ConfigError(f"an ONNX file needs onnxruntime, which is not installed; {extra_text('export')}") from err
    return onnxruntime


def seal(path: Path) -> None:
    """Write the digest of an ONNX file in the place of its `SEAL_KEY`, which holds `UNSEALED`."""
    content = path.read_bytes()
    (found,) = _SEAL.finditer(content)
    digest = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content[: found.start(1)] + digest + content[found.end(1) :])


def require_seal(path: Path) -> None:
    """Raise `CheckpointError` for a sealed file whose content has changed, and where there is none. A file without a seal passes."""
    if not path.is_file():
        raise CheckpointError(f"no file at {path.absolute()}; relative paths start at the current folder")
    with explained("reading", path, CheckpointError):
        content = path.read_bytes()
    if SEAL_KEY.encode() not in content:
        return
    match = _SEAL.search(content)
    zeroed = match and content[: match.start(1)] + UNSEALED.encode() + content[match.end(1) :]
    if match is None or zeroed is None or hashlib.sha256(zeroed).hexdigest().encode() != match[1]:
        raise CheckpointError(
            f"{path} is not what `kdpipe export` wrote: its content does not fit the digest in it. It is damaged: copy it or export it "
            f"again. If you changed the network yourself, remove the metadata key {SEAL_KEY!r}"
        )


def require_runs(path: Path) -> None:
    """Run a file of any origin on one black image in a process of its own; raises `CheckpointError` as `described` does."""
    described(path, "")


def described(path: Path, key: str) -> str | None:
    """
    The metadata of an ONNX file under `key`, after it was run on one black image in a process of its own; None where it has none.

    Raises `CheckpointError` where that process dies or needs too much memory or time, or the network does not map images float32
    `(N, bands, H, W)` to logits float32 `(N, classes, H, W)` or, if the metadata say so, to classes uint8 `(N, H, W)`, of as many bands and
    classes as the metadata name.
    """
    require_onnxruntime()
    require_seal(path)
    try:
        # -P: nothing is imported from the current folder.
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__, str(path.absolute()), key],
            capture_output=True, text=True, errors="replace", timeout=TRIAL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as err:
        raise CheckpointError(
            f"{path} is not a readable ONNX file: it gives no answer within {TRIAL_SECONDS} s"
        ) from err
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        raise CheckpointError(
            f"{path} is not a readable ONNX file: it ends the process that runs it, or asks for more memory than a network needs"
        )
    found = json.loads(lines[-1])
    if "unreadable" in found:
        raise CheckpointError(f"{path} is not a readable ONNX file: {found['unreadable']}")
    if found["fault"] and not key:  # of another program, whose names and shapes are its own
        raise CheckpointError(
            f"{path} fails on a black image of the shape that its input declares: {found['fault']}. Export it anew, so that it computes "
            "the sizes that it declares"
        )
    if found["fault"]:
        raise CheckpointError(
            f"{path} is not a network that predict can run: {found['fault']}. Expected are one input {INPUT!r}, and logits {OUTPUT!r} of "
            "its size with a channel for each class: take a file that `kdpipe export` wrote"
        )
    text: str | None = found["text"]
    return text


def _try(path: str, key: str) -> dict[str, str | None]:
    """The `text` of an ONNX file's metadata, and its `fault` when it is run, in this process, whose memory is limited for that."""
    import resource

    runtime = require_onnxruntime()
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere what is in use already is not known
        in_use_bytes = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit_bytes = in_use_bytes + 4 * Path(path).stat().st_size + TRIAL_BYTES
        _limit_memory(limit_bytes)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map.get(key)
    except Exception as err:
        return {"unreadable": first_line(err)}
    if not key:
        return {"text": None, "fault": _runs(session)}
    try:
        card = json.loads(text or "")
        bands, classes, output = len(card["bands"]), len(card["classes"]), card.get("output", OUTPUT)
    except (ValueError, TypeError, LookupError, RecursionError):
        return {"text": text, "fault": ""}  # whoever asked refuses such a text
    try:
        for each in session.get_inputs():
            _allow_memory(_trial_sides(each.shape))
        return {"text": text, "fault": fault_of(session, bands, classes, output)}
    except Exception as err:
        return {"text": text, "fault": first_line(err)}


def _limit_memory(limit_bytes: int) -> None:
    """Let this process have no more memory than that, or than it may have anyway."""
    import resource

    _, most_bytes = resource.getrlimit(resource.RLIMIT_AS)
    soft_bytes = limit_bytes if most_bytes == resource.RLIM_INFINITY else min(limit_bytes, most_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (soft_bytes, most_bytes))


def _allow_memory(sides: Sequence[int]) -> None:
    """Let this process have what a network needs for an image of this height and width, if it is one of one large size."""
    import resource

    soft_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft_bytes != resource.RLIM_INFINITY and len(sides) == 2:
        _limit_memory(soft_bytes + BYTES_PER_PX * sides[0] * sides[1])


def _trial_sides(shape: Sequence[Any]) -> list[int]:
    """Height and width of the image to try a network on, from the shape `(N, B, H, W)` of its input: `TRIAL_PX` where they may vary."""
    return [size if isinstance(size, int) else TRIAL_PX for size in shape[2:]]


def _runs(session: Any) -> str:
    """Run a session on black images of its own shape; empty, or why not."""
    inputs = session.get_inputs()
    usual = (1, 3, TRIAL_PX, TRIAL_PX)
    feeds = {
        each.name: np.zeros(
            [size if isinstance(size, int) else usual[i % 4] for i, size in enumerate(each.shape)], np.float32
        )
        for each in inputs
        if each.type == "tensor(float)"
    }
    if len(feeds) == len(inputs):  # others are refused by whoever asked
        for image in feeds.values():
            _allow_memory(image.shape[2:])
        try:
            session.run(None, feeds)
        except Exception as err:
            return first_line(err)
    return ""


def fault_of(session: Any, bands: int, classes: int, output: str = OUTPUT) -> str:
    """What is wrong with a session's answer, logits or `CLASSES`, to one black image; empty where nothing is."""
    names = [each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()]
    if names[0] != [INPUT] or output not in names[1]:
        return f"its inputs are {names[0]} and its outputs {names[1]}"
    shape = (1, bands, *_trial_sides(session.get_inputs()[0].shape))
    (found,) = session.run([output], {INPUT: np.zeros(shape, np.float32)})
    of_classes = output == CLASSES
    expected, dtype = (1, *([] if of_classes else [classes]), *shape[2:]), "uint8" if of_classes else "float32"
    if not isinstance(found, np.ndarray) or found.shape != expected or found.dtype != dtype:
        form = f"{found.dtype} of the shape {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        return f"it answers an image of the shape {shape} by {form}, expected {dtype} of the shape {expected}"
    return ""


def first_line(err: Exception) -> str:
    """The first line of an error's text, cut off where it is long."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:300].rstrip(".")


if __name__ == "__main__":
    print(json.dumps(_try(sys.argv[1], sys.argv[2])))  # noqa: T201 - read by `described`
