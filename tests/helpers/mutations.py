"""Valid content made wrong: parts replaced, dropped, doubled, or bytes overwritten."""

import copy
import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
from datetime import timedelta

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# A loaded machine may pause a test for seconds; what does not end, or doubles with each level, still fails.
fuzzed = settings(
    max_examples=120, deadline=timedelta(seconds=20), database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip

NASTY = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([2**31, 2**63, -(2**64), 10**40, 10**400]),
    st.floats(), st.text(max_size=6),
    st.sampled_from(["..", ".", "/etc/passwd", "../../x", "a/../b", "\x00", "\x1b[2J", "\ud800", "__x", "zarr.json", "object", "|O",
                     "pickle", "1.0", "uint16", "9" * 5000]),
    st.lists(st.integers(-1, 300), max_size=4), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just([[[[[[]]]]]]), st.just({"name": "pickle"}),
)  # fmt: skip


def places(content, prefix=()):
    yield prefix
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*prefix, key))


@st.composite
def mutated(draw, valid):
    """A valid value with one to three of its parts replaced, dropped, doubled or given something that does not belong."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from([place for place in places(content) if place] or [("x",)]))
        target = content
        for parent in parents:
            target = target[parent]
        if not isinstance(target, dict | list) or (isinstance(target, dict) and key not in target):
            continue
        action = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if action == "drop":
            del target[key]
        elif action == "replace":
            target[key] = copy.deepcopy(draw(NASTY))
        elif isinstance(target, list):
            target.append(copy.deepcopy(draw(st.sampled_from(target))))
        else:
            target[draw(st.text(max_size=5))] = copy.deepcopy(draw(NASTY))
    return content


@st.composite
def spliced(draw, valid):
    """Bytes of which a part is overwritten, cut out or repeated."""
    start = draw(st.integers(0, len(valid) - 1))
    end = draw(st.integers(start, min(len(valid), start + 200)))
    middle = draw(
        st.one_of(st.binary(max_size=20), st.just(valid[start:end] * 2), st.just(b"[" * 5000), st.just(b"9" * 5000))
    )
    return valid[:start] + middle + valid[end:]


# The mutations below are drawn from a seeded `random.Random`, so that a process can try thousands of them and name one by its number.

STRINGS = [
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "\x1b[2J",
    "[/b]",
    "=1+1",
    "\u202egpj",
    "x" * 5000,
    "format",
    "kdpipe",
    "state_dict",
    "tu-hf-hub:a/b",
]
NUMBERS = [-1, 0, 1, 2, 255, 2**16, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63, 10**400]


def damaged(data, rng):
    """Bytes with one kind of damage: flipped bits, a cut, swapped blocks, inserted or repeated bytes, zeros, a run of one value."""
    data = bytearray(data)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 2, 8, 64, 512, 4096]))
    kind = rng.randrange(8)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 1, 2, 16])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:]
    elif kind == 2:
        other = rng.randrange(len(data))
        size = min(end - start, len(data) - other)
        data[start : start + size], data[other : other + size] = data[other : other + size], data[start : start + size]
    elif kind == 3:
        data[start:start] = rng.randbytes(end - start)
    elif kind == 4:
        data[start:end] = bytes(end - start)
    elif kind == 5:
        data[start:end] = data[start:end] * 2
    elif kind == 6:
        del data[start:end]
    else:
        data[start:end] = bytes([rng.randrange(256)]) * (end - start)
    return bytes(data)


PICKLE_OPCODES = bytes(sorted(ord(opcode.code) for opcode in pickletools.opcodes))
GLOBALS = ["posix system", "os system", "builtins exec", "builtins bytearray", "_codecs encode", "torch load", "torch Size",
           "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_parameter", "torch FloatTensor",
           "torch._utils _rebuild_meta_tensor_no_storage", "torch.nn.modules.linear Linear", "collections Counter"]  # fmt: skip


def damaged_pickle(data, rng, canary):
    """A pickle with another opcode, number, text or global in one place, or one that would make the file `canary`."""
    kind = rng.randrange(6)
    if kind == 0:
        return damaged(data, rng)
    if kind == 1:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.choice(PICKLE_OPCODES)]) + data[place + 1 :]
    if kind == 2 and rng.random() < 0.2:
        return (
            b"\x80\x02cposix\nsystem\nX"
            + struct.pack("<I", len(touch := f"touch {canary}"))
            + touch.encode()
            + b"\x85R."
        )
    try:
        opcodes = list(pickletools.genops(data))
    except ValueError:
        return damaged(data, rng)
    wanted, made = {
        3: (("BININT", "BININT1", "BININT2", "LONG1"), lambda: pickle.dumps(rng.choice(NUMBERS), 2)[2:-1]),
        4: (("BINUNICODE",), lambda: b"X" + struct.pack("<I", len(text := rng.choice(STRINGS).encode())) + text),
    }.get(kind, (("GLOBAL",), lambda: b"c" + rng.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"))
    found = [i for i, (opcode, _, _) in enumerate(opcodes[:-1]) if opcode.name in wanted]
    if not found:
        return damaged(data, rng)
    i = rng.choice(found)
    return data[: opcodes[i][2]] + made() + data[opcodes[i + 1][2] :]


def damaged_archive(data, rng, canary):
    """A file of torch.save with right checksums and a wrong record: changed, doubled, left out, renamed, swapped, compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    i, j = rng.randrange(len(records)), rng.randrange(len(records))
    kind, compressed = rng.randrange(10), None
    pickled = next(k for k, (name, _) in enumerate(records) if name.endswith("data.pkl"))
    if kind < 5:
        records[pickled] = records[pickled][0], damaged_pickle(records[pickled][1], rng, canary)
    elif kind == 5:
        records.append((records[i][0], records[j][1]))
    elif kind == 6:
        del records[i]
    elif kind == 7:
        records[i], records[j] = (records[i][0], records[j][1]), (records[j][0], records[i][1])
    elif kind == 8:
        records[i] = records[i][0], damaged(records[i][1] or b"\0", rng)
    else:
        compressed = i
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's of two records of one name
        for k, (name, content) in enumerate(records):
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if k == compressed else zipfile.ZIP_STORED)
    return written.getvalue()


def altered(content, rng, values):
    """A copy of nested dicts and lists with one to three parts replaced by one of `values`, dropped, doubled or given another name."""
    whole, content = list(places(content))[1:], copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        *parents, key = rng.choice(whole)
        kind, target = rng.randrange(5), content
        try:
            for parent in parents:
                target = target[parent]
            if kind < 3:
                target[key] = copy.deepcopy(rng.choice(values))
            elif kind == 3 or isinstance(target, list):
                del target[key]
            else:
                target[rng.choice(STRINGS + [0, None])] = target.pop(key)
        except (LookupError, TypeError, AttributeError):  # an earlier change took that place away
            continue
    return content


YAML_BITS = ["!!python/object/apply:os.system ['touch CANARY']", "!!int x", "!!float []", "!!binary x", "&a [*a]", "*a", "<<: *a",
             "? [a]", "9" * 5000, "[" * 3000, "{" * 3000, "\x00", '"\\ud800"', '"\\ud83d\\ude00"', "- " * 2000, "|\n", "%YAML 9.9", "---",
             "1e999", "!<!>", "&x {a: &y [1, 2], b: [*y, *y]}", ".nan", "0o7777777777777777777777"]  # fmt: skip
LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def damaged_yaml(text, rng, canary):
    """The text of a config with other values, keys and types, odd YAML, or damaged bytes."""
    kind = rng.randrange(5)
    if kind == 0:
        return damaged(text.encode(), rng)
    if kind == 1:
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        key = lines[i].partition(":")[0]
        lines[i] = f"{key}: {rng.choice(YAML_BITS).replace('CANARY', str(canary))}"
        return "\n".join(lines).encode()
    if kind == 2 and rng.random() < 0.1:
        return (LAUGHS + text).encode()
    values = [None, True, -1, 2**31, 10**400, float("nan"), float("inf"), 1e300, [], {}, [[[[]]]], {"a": {}}, *STRINGS]
    return yaml.safe_dump(altered(yaml.safe_load(text), rng, values), sort_keys=False).encode()


OPERATORS = ["Relu", "Conv", "Resize", "Reshape", "Tile", "Expand", "Softmax", "Gather", "MatMul", "ConvTranspose", "TopK", "Loop", "If",
             "Identity", "ConstantOfShape", "Pad", "Slice", "Range", "Unknown"]  # fmt: skip


def altered_graph(model, rng):
    """An ONNX model with another attribute, operator, name, tensor, version or description in one place."""
    graph = model.graph
    kind = rng.randrange(9)
    node = rng.choice(graph.node)
    if kind <= 1:
        attribute = rng.choice(rng.choice([each for each in graph.node if each.attribute]).attribute)
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([-1, 0, 3, 7, 1000, 2**31, 2**40])
        elif attribute.floats or attribute.type == 1:
            attribute.f = rng.choice([float("nan"), float("inf"), -1e30, 0.0])
        else:
            attribute.i = rng.choice([-1, 0, 1, 2, 2**31, 2**40])
    elif kind == 2:
        node.op_type = rng.choice(OPERATORS)
    elif kind == 3:
        names = node.input if rng.random() < 0.5 and node.input else node.output
        names[rng.randrange(len(names))] = rng.choice(["", "images", "logits", "x", rng.choice(graph.node).output[0]])
    elif kind == 4:
        graph.node.remove(node)
    elif kind == 5:
        tensor = rng.choice(graph.initializer)
        if tensor.dims and rng.random() < 0.5:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([-1, 0, 1, 7, 2**31, 2**62])
        elif rng.random() < 0.5:
            tensor.raw_data = damaged(tensor.raw_data or b"\0", rng)
        else:
            tensor.data_type = rng.randrange(24)
    elif kind == 6:
        tensor = rng.choice(graph.initializer)
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", rng.choice(["/etc/passwd", "../../etc/passwd", "nothing.bin", ""])
    elif kind == 7:
        card = next(each for each in model.metadata_props if each.key == "kdpipe")
        values = [None, -1, 0, 10**9, 1e300, "x", [], {}, [1], [[0, 0]], *STRINGS]
        card.value = json.dumps(altered(json.loads(card.value), rng, values))
    else:
        model.ir_version = rng.choice([0, 1, 8, 99])
        model.opset_import[0].version = rng.choice([0, 1, 7, 17, 21, 999])
    return model
