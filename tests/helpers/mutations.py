"""Valid content made wrong: parts replaced, dropped, doubled, or bytes overwritten."""

import copy
from datetime import timedelta

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
            target[key] = draw(NASTY)
        elif isinstance(target, list):
            target.append(copy.deepcopy(draw(st.sampled_from(target))))
        else:
            target[draw(st.text(max_size=5))] = draw(NASTY)
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
