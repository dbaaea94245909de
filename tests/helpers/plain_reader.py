"""
A reader of caches from cache/FORMAT.md alone: the standard library, NumPy, and zstd through numcodecs' binding to it.

It proves that the page is enough, so it shares nothing with kdpipe and nothing with zarr.
"""

import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
from numcodecs.zstd import Zstd


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compact(text: str) -> str:
    """The same JSON tokens without white space outside of strings."""
    kept, in_string, escaped = [], False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character in " \n":
            continue
        elif character == '"':
            in_string = True
        kept.append(character)
    return "".join(kept)


def member(text: str, name: str) -> str:
    """The text of one member of a canonical object at indent 1."""
    start = text.index(f'\n "{name}": ') + len(f'\n "{name}": ')
    ends = [text.find(end, start) for end in ("\n}", ',\n "')]
    return text[start : min(end for end in ends if end >= 0)]


def check_id(tile: str) -> None:
    for part in tile.split("/"):
        assert part.strip(".") and not part.startswith("__") and part != "zarr.json" and "\\" not in part, tile
        assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in part), tile


def groups_above(tiles: list[dict]) -> list[list[str]]:
    """The groups above each tile."""
    paths = [f"tiles/{tile['id']}".split("/") for tile in tiles]
    return [["/".join(path[:end]) for end in range(1, len(path))] for path in paths]


class Cache:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "manifest.json").read_text("ascii")
        self.manifest = manifest = json.loads(text)
        root = json.loads((folder / "zarr.json").read_text("ascii"))["attributes"]["kdpipe"]
        of_recipe = root["format_version"] if manifest["format_version"][0] == "6" else manifest["format_version"]
        self.major, kind = int(of_recipe.split(".")[0]), manifest["recipe"]["kind"]
        assert kind == {2: "logits", 4: "soft", 5: "soft"}[self.major], kind
        checksum = manifest["checksum"]
        without = text.replace(f'\n "checksum": "{checksum}",', "", 1)
        assert sha256(compact(without).encode()) == checksum, "checksum"
        self.recipe_text = compact(member(text, "recipe"))
        self.tiles = self.read_index() if "index" in manifest else manifest["tiles"]
        images = {tile["id"]: tile["image"]["sha256"] for tile in self.tiles}
        assert len(images) == len(self.tiles)
        for tile in images:
            check_id(tile)
        # Ids are sorted by code point before they are escaped.
        listed = ",".join(f"{json.dumps(tile)}:{json.dumps(images[tile])}" for tile in sorted(images))
        fingerprint = f'{{"images":{{{listed}}},"recipe":{self.recipe_text}}}'
        assert sha256(fingerprint.encode()) == manifest["fingerprint"], "fingerprint"
        for group, digest in self.groups().items():
            assert sha256((folder / group / "zarr.json").read_bytes()) == digest, group
        assert root["recipe"] == manifest["recipe"] and root["format_version"] == of_recipe

    def groups(self) -> dict[str, str]:
        if "groups" in self.manifest:
            return self.manifest["groups"]
        empty = b'{\n "attributes": {},\n "node_type": "group",\n "zarr_format": 3\n}\n'
        parents = {group for groups in groups_above(self.tiles) for group in groups}
        return {"": self.manifest["root_sha256"], **dict.fromkeys(parents, sha256(empty))}

    def read_index(self) -> list[dict]:
        """The tiles that the index lists, as objects like those of a manifest that lists them."""
        files = {name: (self.folder / name).read_bytes() for name in self.manifest["index"]}
        assert {name: sha256(data) for name, data in files.items()} == self.manifest["index"], "index"
        columns = {}
        for name in {path.split("/")[1] for path in files} - {"zarr.json"}:
            array = json.loads(files[f"index/{name}/zarr.json"])
            assert array["chunk_grid"]["configuration"]["chunk_shape"] == array["shape"]
            chunk = files[f"index/{name}/{'.'.join('0' * len(array['shape']))}"]
            columns[name] = np.frombuffer(chunk, f"<u{int(array['data_type'][4:]) // 8}").reshape(array["shape"])
        text, tiles, start = columns["id"].tobytes(), [], 0
        for i in range(self.manifest["tiles"]):
            end = int(columns["id_end"][i])
            numbers = {name: int(columns[name][i]) for name in ("height", "width", "shard_bytes")}
            digests = {name: columns[name][i].tobytes().hex() for name in ("shard_sha256", "metadata_sha256")}
            image = {"sha256": columns["image_sha256"][i].tobytes().hex(), "size_bytes": int(columns["image_bytes"][i])}
            tiles.append({"id": text[start:end].decode(), "image": image, **numbers, **digests})
            start = end
        assert start == len(text) and len(columns["height"]) == len(tiles)
        in_order = [tiles[i]["id"] for i in columns["by_id"]]
        assert in_order == sorted({tile["id"] for tile in tiles})
        return tiles

    def read(self, tile_id: str) -> np.ndarray:
        """The integers of a tile, `(class, row, column)`, after every check that the page names."""
        (record,) = [tile for tile in self.tiles if tile["id"] == tile_id]
        recipe = self.manifest["recipe"]
        folder = self.folder / "tiles" / tile_id
        assert folder.resolve().is_relative_to(self.folder.resolve())
        metadata, shard = (folder / "zarr.json").read_bytes(), (folder / "0.0.0").read_bytes()
        assert sha256(metadata) == record["metadata_sha256"]
        assert (sha256(shard), len(shard)) == (record["shard_sha256"], record["shard_bytes"])
        array = json.loads(metadata)
        receipt = array["attributes"]["kdpipe"]
        assert receipt["tile"] == tile_id and receipt["image"] == record["image"]
        assert receipt["recipe_sha256"] == sha256(self.recipe_text.encode())
        if recipe["kind"] == "soft":
            channels = recipe["classes"]
        else:
            teacher = recipe["teachers"][0]
            channels = [name for i, name in enumerate(teacher["classes"]) if i not in teacher["drop_channels"]]
        shape = len(channels), record["height"], record["width"]
        assert tuple(array["shape"]) == shape
        width = 8 if recipe["bits"] <= 8 and self.major != 5 else 16
        assert array["data_type"] == f"uint{width}"
        (sharding,) = array["codecs"]
        assert sharding["name"] == "sharding_indexed"
        inner = sharding["configuration"]
        bytes_codec = {"name": "bytes"} if width == 8 else {"name": "bytes", "configuration": {"endian": "little"}}
        zstd = [{"name": "zstd", "configuration": {"level": level, "checksum": False}} for level in (3, 7)]
        assert inner["index_location"] == "end" and inner["codecs"] in (
            [bytes_codec, zstd[0], {"name": "crc32c"}], [bytes_codec, zstd[1], {"name": "crc32c"}],
        )  # fmt: skip
        _, chunk_h, chunk_w = inner["chunk_shape"]
        rows, columns = -(-shape[1] // chunk_h), -(-shape[2] // chunk_w)
        index = shard[-16 * rows * columns - 4 :]
        assert crc32c(index[:-4]) == int.from_bytes(index[-4:], "little"), "index"
        places = np.frombuffer(index[:-4], "<u8").reshape(rows, columns, 2)
        values = np.empty((shape[0], rows * chunk_h, columns * chunk_w), f"<u{width // 8}")
        for row in range(rows):
            for column in range(columns):
                start, size = map(int, places[row, column])
                chunk = shard[start : start + size]
                if "chunk_sha256" in receipt:
                    at = 32 * (row * columns + column)
                    assert sha256(chunk)[:32] == receipt["chunk_sha256"][at : at + 32], (row, column)
                assert len(chunk) == size and crc32c(chunk[:-4]) == int.from_bytes(chunk[-4:], "little"), (row, column)
                into = np.frombuffer(Zstd().decode(chunk[:-4]), values.dtype).reshape(shape[0], chunk_h, chunk_w)
                values[:, row * chunk_h :][:, :chunk_h, column * chunk_w :][:, :, :chunk_w] = into
        assert not values[:, shape[1] :].any() and not values[:, :, shape[2] :].any()
        values = values[:, : shape[1], : shape[2]]
        if recipe["kind"] == "logits":
            assert (values.max(axis=0) == 2**width - 1).all()
            return values
        for row in range(1, shape[1]):
            if row % recipe["key_row_px"]:
                values[:, row] += values[:, row - 1]  # modulo 256 or 65536, as these integers wrap around
        implied = values == 2**width - 1
        assert (implied.sum(axis=0) == 1).all()
        others = np.where(implied, 0, values).sum(axis=0, dtype=np.int64)
        assert (others <= self.levels).all()
        return np.where(implied, self.levels - others, values).astype(values.dtype)

    @property
    def levels(self) -> int:
        recipe = self.manifest["recipe"]
        mark = 2 ** (8 if recipe["bits"] <= 8 else 16) - 1
        count, share = len(recipe["classes"]), 2 ** recipe["bits"] - 1
        fewest = min(n for n in range(1, share + 1) if (count - 1) * share <= count * n)
        assert self.major == 4 or (recipe["bits"] == 8 and count > 19)
        assert recipe["levels"] == min(fewest, mark - 1) * (256 if self.major == 5 else 1)
        return recipe["levels"]

    def probabilities(self, tile_id: str) -> np.ndarray:
        return self.read(tile_id) / self.levels

    def logits(self, tile_id: str) -> np.ndarray:
        bits = self.manifest["recipe"]["bits"]
        top = 2**bits - 1
        return -{8: 32, 16: 64}[bits] * ((top - self.read(tile_id).astype(int)) / top) ** 2
