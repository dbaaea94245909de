"""Running `kdpipe init` on small folders of tiles, and filling in its config as a user would."""

import numpy as np
import yaml
from helpers.files import write_image
from PIL import Image

from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.write import run_name, write_first_config

CLASSES = ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]
TEACHER_CLASSES = ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "background"]
CLASS_MAP = {
    "Tree": {"Forest": 1},
    "Rangeland": {"Grassland": 0.7, "SemiNatural": 0.3},
    "Developed": {"Settlement": 1},
    "Road": {"Settlement": 1},
    "Bareland": {"SemiNatural": 1},
    "Water": {"Background": 1},
}


def init(*folders, teacher=None, out="mine.yaml", overwrite=False, **said):
    return write_first_config(
        list(map(str, folders)), teacher and str(teacher), out, Given(name=run_name(out), **said), overwrite=overwrite
    )


def filled(text, answers):
    """The config's text with its FILL_IN replaced by `answers` in order."""
    lines, rest = [], list(answers)
    for line in text.splitlines():
        code, hash_, comment = line.partition("#")
        if "FILL_IN" in code:
            code = code.replace("FILL_IN", rest.pop(0))
        lines.append(code + hash_ + comment)
    assert not rest
    return "\n".join(lines) + "\n"


def flow(value):
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("...").strip()


def write_mask(path, values_HW):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values_HW, dtype=np.uint8)).save(path)


def small(root, values=((0, 1), (2, 255)), tiles=2, side=64):
    """A root of equal tiles whose masks hold these values in equal parts."""
    mask = np.kron(np.array(values), np.ones((side // 2, side // 2), dtype=int))
    for i in range(tiles):
        write_image(root / "images" / f"{i}.png", side, side, seed=i)
        write_mask(root / "masks" / f"{i}.png", mask)
    return root
