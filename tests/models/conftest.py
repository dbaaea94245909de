"""Folders of transformers that several files of tests load."""

import pytest
from helpers.foreign_networks import save_transformers


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of a kind of network, made when it is first asked for; tests only read it."""
    root, made = tmp_path_factory.mktemp("transformers"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = save_transformers(kind, root / kind)
        return made[kind]

    return folder
