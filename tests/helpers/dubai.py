"""Some of the real tiles."""


def link_tiles(dubai, root, split, stems):
    """Links to images and masks of Dubai's `split` in `root/split`, so that the real teacher runs on few tiles; the folder."""
    for kind in ("images", "masks"):
        (root / split / kind).mkdir(parents=True)
        for stem in stems:
            source = next((dubai / "data" / "dubai" / split / kind).glob(f"{stem}.*"))
            (root / split / kind / source.name).symlink_to(source)
    return root / split
