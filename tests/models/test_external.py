"""Networks that kdpipe did not write predict what they do in a script of their owner's; no file of theirs runs code."""

import copy
import json
import pickle
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from helpers.foreign_networks import OWN_MODULE, Pooled, export, save_transformers
from PIL import Image
from torch import nn

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.models.external.exported import digests as file_digests
from kdpipe.pipeline.models.external.exported import load_exported
from kdpipe.pipeline.models.external.onnx_file import TRIAL_PX
from kdpipe.pipeline.models.external.outputs import AtImageSize
from kdpipe.pipeline.models.external.own_module import build_own, find_source
from kdpipe.pipeline.models.external.transformers_folder import class_names, digests, load_pretrained
from kdpipe.pipeline.models.views import padded_logits

CLASSES = [f"c{i}" for i in range(8)]


def images_of(height, width, count=2):
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1)).eval()


class TestTransformers:
    @pytest.mark.parametrize("kind", ["segformer", "upernet", "dpt", "beit", "mask2former", "oneformer"])
    def test_scores_are_those_of_the_owners_own_script(self, kind, folders):
        """The script is that of transformers' documentation: PIL images through the processor, its own post-processing."""
        import transformers as tf

        folder, images = folders(kind), images_of(70, 90)
        auto = (
            tf.AutoModelForUniversalSegmentation
            if "former" in kind and kind != "segformer"
            else tf.AutoModelForSemanticSegmentation
        )
        own = auto.from_pretrained(folder).eval()
        processor = (tf.AutoProcessor if kind == "oneformer" else tf.AutoImageProcessor).from_pretrained(folder)
        task = {"task_inputs": ["semantic"] * 2} if kind == "oneformer" else {}
        inputs = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt", **task)
        with torch.inference_mode():
            outputs = own(**inputs)
        expected = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[(70, 90)] * 2, return_segmentation_scores=True
        )

        ours = load_pretrained(str(folder), CLASSES, "teacher")
        with torch.inference_mode():
            logits = padded_logits(ours, torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        assert logits.shape == (2, 8, 70, 90)
        for found, each in zip(logits, expected, strict=True):
            scores = each["segmentation_scores"]
            if "masks_queries_logits" in outputs:
                shares = scores / scores.sum(dim=0)
                torch.testing.assert_close(found.softmax(dim=0), shares, rtol=1e-4, atol=1e-6)
            else:
                torch.testing.assert_close(found, scores, rtol=0, atol=1e-5)
            assert torch.equal(found.argmax(dim=0), each["segmentation"])

    def test_the_files_own_classes_are_offered(self, folders):
        folder = folders("segformer")
        assert class_names(folder) == CLASSES
        with pytest.raises(CheckpointError, match=r"classes: \[c0, c1, c2, c3, c4, c5, c6, c7\]"):
            load_pretrained(str(folder), CLASSES[:-1], "teacher")
        with pytest.raises(CheckpointError, match="another order"):
            load_pretrained(str(folder), CLASSES[::-1], "teacher")
        load_pretrained(str(folder), ["Tree", *CLASSES[1:]], "teacher")  # renamed

    def test_weights_that_can_execute_code_are_refused(self, folders, tmp_path):
        folder = tmp_path / "pickled"
        folder.mkdir()
        (folder / "config.json").write_text((folders("segformer") / "config.json").read_text())
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(CheckpointError, match=r"no weights as .safetensors.*(?s:.*)save_pretrained"):
            load_pretrained(str(folder), CLASSES, "teacher")

    def test_a_folder_that_brings_code_does_not_run_it(self, folders, tmp_path, monkeypatch):
        folder = save_transformers("segformer", tmp_path / "mine")
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForSemanticSegmentation": "mine.Net"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        asked = []
        monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
        with pytest.raises(CheckpointError, match="transformers cannot load"):
            load_pretrained(str(folder), CLASSES, "teacher")
        assert not (tmp_path / "ran").exists()
        assert asked == [], "nobody is asked to run it"

    def test_what_determines_the_values_is_in_the_digests(self, folders):
        found = digests(folders("mask2former"))
        assert {"config.json", "preprocessor_config.json", "model.safetensors"} <= found.keys()

    def test_a_missing_folder_and_missing_weights_are_named(self, folders, tmp_path):
        with pytest.raises(CheckpointError, match=r"teacher.pretrained: no folder at .*/nowhere"):
            load_pretrained("./nowhere", CLASSES, "teacher")
        folder = save_transformers("segformer", tmp_path / "cut")
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["decode_head.classifier.bias"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"missing: decode_head.classifier.bias"):
            load_pretrained(str(folder), CLASSES, "teacher")


class TestOwnModule:
    @pytest.fixture
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        package = tmp_path / "my_networks"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
        (package / "teachers.py").write_text(OWN_MODULE)
        (tmp_path / "my_teacher.py").write_text(OWN_MODULE)
        yield tmp_path
        for name in ("my_teacher", "my_networks", "my_networks.teachers"):
            sys.modules.pop(name, None)

    def test_a_function_in_the_current_folder_builds_the_network(self, here):
        built = build_own("my_teacher:build", {"width": 4}, "teacher.model")
        assert built.stem.weight.shape == (4, 3, 3, 3)
        assert isinstance(build_own("my_teacher:Pooled", {"width": 4, "classes": 2}, "teacher.model"), nn.Module)

    def test_its_file_is_found_without_importing_anything(self, here):
        import hashlib

        source = find_source("my_networks.teachers:build")
        assert source.path.samefile(here / "my_networks/teachers.py")
        assert source.sha256 == hashlib.sha256(OWN_MODULE.encode()).hexdigest()
        assert find_source("my_networks.nothing:build") is None
        assert find_source("nowhere_at_all:build") is None
        installed = find_source("segmentation_models_pytorch.decoders.unet.model:Unet")
        assert installed.path.name == "model.py"
        assert installed.version

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("nowhere_at_all:build", {}, "cannot import nowhere_at_all.*the installed packages and in"),
            ("my_networks.teachers:build", {}, "RuntimeError: imported"),
            ("my_teacher:nothing", {}, "has no nothing"),
            ("my_teacher:OWN", {}, "has no OWN"),
            ("my_teacher:torch", {}, "should be a function or a class"),
            ("my_teacher:build", {"depth": 3}, r"options \{depth: 3\} raised TypeError"),
            ("os:getcwd", {}, r"should return a torch.nn.Module, found str"),
        ],
    )
    def test_what_is_wrong_is_named(self, here, name, options, message):
        with pytest.raises(ConfigError, match=message):
            build_own(name, options, "teacher.model")

    def test_coarser_logits_are_enlarged_and_it_is_said_once(self, here):
        said = []
        network = AtImageSize(build_own("my_teacher:build", {}, "teacher.model"), 8, "teacher.model", said.append)
        images = torch.rand(2, 3, 64, 96)
        with torch.inference_mode():
            logits = network(images)
            network(images)
            coarse = network.network(images)["out"]
        assert logits.shape == (2, 8, 64, 96)
        # Pixel 5 of the image lies at 2.25 pixels of the logits, counted from centre to centre.
        torch.testing.assert_close(logits[..., 5, 5], _bilinear(coarse, 2.25), rtol=1e-5, atol=1e-6)
        assert said == [
            "teacher.model: its logits have 32 x 48 px for an image of 64 x 96 px, and are enlarged bilinearly"
        ]

    def test_a_copy_says_no_more_than_the_network_and_needs_no_copy_of_the_terminal(self):
        class Terminal:
            def __init__(self):
                self.lock, self.said = threading.RLock(), []

            def say(self, sentence):
                self.said.append(sentence)

        terminal = Terminal()
        network = AtImageSize(Pooled(), 8, "teacher.model", terminal.say)
        for each in (copy.deepcopy(network), network):
            each(torch.zeros(1, 3, 32, 32))
        assert len(terminal.said) == 1

    def test_a_network_of_torchvision_returns_a_mapping(self):
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        own = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=8).eval()
        images = torch.rand(1, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(AtImageSize(own, 8, "teacher.model", print)(images), own(images)["out"])

    def test_other_outputs_are_refused_in_their_terms(self):
        class Returns(nn.Module):
            def __init__(self, output):
                super().__init__()
                self.output = output

            def forward(self, x):
                return self.output

        for output, message in [
            ({"features": torch.zeros(1)}, "found dict with the keys features"),
            (torch.zeros(1, 3, 32, 32), r"= \(1, 8, h, w\).*found \(1, 3, 32, 32\)"),
            (torch.zeros(1, 8, 32, 32, dtype=torch.int64), "floating-point numbers; found torch.int64"),
            ([torch.zeros(1)], "found list"),
        ]:
            with pytest.raises(ConfigError, match=message):
                AtImageSize(Returns(output), 8, "teacher.model", print)(torch.zeros(1, 3, 32, 32))


def _bilinear(x, at):
    low = int(at)
    share = at - low
    row = x[..., low, :] * (1 - share) + x[..., low + 1, :] * share
    return row[..., low] * (1 - share) + row[..., low + 1] * share


class TestExported:
    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_it_predicts_what_the_exported_network_does(self, network, suffix, tmp_path):
        loaded = load_exported(str(export(network, tmp_path / f"teacher{suffix}")), "teacher")
        images = torch.rand(3, 3, 64, 32)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), network(images), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_a_network_of_one_size_says_which_window_it_needs(self, network, suffix, tmp_path):
        loaded = load_exported(str(export(network, tmp_path / f"fixed{suffix}", size=64)), "teacher")
        images = torch.rand(3, 3, 64, 64)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), network(images), rtol=0, atol=1e-5)
            with pytest.raises(ConfigError, match=r"set teacher.window: 64"):
                loaded(torch.rand(1, 3, 96, 96))

    @pytest.mark.parametrize("side", [64, 128])
    def test_a_graph_that_fails_at_a_size_that_it_declares_is_one_paragraph(self, network, side, tmp_path):
        """Files that were exported for one size, whose declarations alone were changed to any. On loading, one of them is tried at it."""
        import onnx

        class Adds(nn.Module):
            def __init__(self):
                super().__init__()
                self.network, self.shift = network, nn.Parameter(torch.zeros(1, 1, side, side))

            def forward(self, x):
                return self.network(x + self.shift)

        path = export(Adds(), tmp_path / "teacher.onnx", size=side)
        model = onnx.load(path)
        for value in (*model.graph.input, *model.graph.output):
            for dim, name in ((2, "h"), (3, "w")):
                value.type.tensor_type.shape.dim[dim].dim_param = name
        onnx.save(model, path)
        if side != TRIAL_PX:
            with pytest.raises(CheckpointError, match="teacher.file: .* fails on a black image of the shape"):
                load_exported(str(path), "teacher")
            return
        loaded = load_exported(str(path), "teacher")
        with torch.inference_mode():
            assert loaded(torch.rand(1, 3, side, side)).shape == (1, 8, side, side)
            with pytest.raises(ConfigError, match=r"teacher.onnx cannot predict images of the shape \(1, 3, 96, 96\)"):
                loaded(torch.rand(1, 3, 96, 96))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
    def test_torchscript_is_refused_with_lines_that_export_it(self, network, tmp_path):
        path = tmp_path / "scripted.pt2"
        torch.jit.trace(network, torch.zeros(1, 3, 64, 64)).save(str(path))
        with pytest.raises(CheckpointError, match="is TorchScript") as caught:
            load_exported(str(path), "teacher")
        lines = [line[4:] for line in str(caught.value).splitlines() if line.startswith("    ")]
        exec("\n".join(lines), {})
        loaded, images = load_exported(str(tmp_path / "scripted.onnx"), "teacher"), torch.rand(1, 3, 96, 64)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(images), network(images), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["teacher.onnx", "teacher.pt2"])
    def test_a_damaged_file_is_one_paragraph(self, network, name, tmp_path):
        path = export(network, tmp_path / name)
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"\0" * 100):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"teacher.file: .*teacher"):
                load_exported(str(path), "teacher")

    def test_weights_beside_an_onnx_file_are_part_of_it(self, network, tmp_path):
        import onnx

        path = export(network, tmp_path / "teacher.onnx")
        beside = {"save_as_external_data": True, "location": "teacher.data", "size_threshold": 0}
        onnx.save_model(onnx.load(path), path, **beside)
        assert file_digests(str(path), "teacher").keys() == {"teacher.onnx", "teacher.data"}
        load_exported(str(path), "teacher")
        (tmp_path / "teacher.data").rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match=r"needs the file teacher.data beside it"):
            load_exported(str(path), "teacher")
        path.write_bytes(path.read_bytes().replace(b"teacher.data", b"../../secret"))
        with pytest.raises(CheckpointError, match="outside its folder"):
            load_exported(str(path), "teacher")

    def test_other_files_are_told_where_they_belong(self, tmp_path):
        (tmp_path / "weights.pth").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"weights alone go under teacher.checkpoint"):
            load_exported(str(tmp_path / "weights.pth"), "teacher")
        with pytest.raises(CheckpointError, match="no file at"):
            load_exported(str(tmp_path / "nowhere.onnx"), "teacher")


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


class TestHostileArchives:
    """Each of these runs code in `torch.export.load`, or would if nothing had looked first."""

    @pytest.fixture
    def plant(self, tmp_path):
        """A function that writes an archive with one member replaced or added, and returns its path and the canary's."""
        model = nn.Conv2d(3, 8, 1).eval()
        original = export(model, tmp_path / "original.pt2")

        def planted(member, change):
            path = tmp_path / "planted.pt2"
            with zipfile.ZipFile(original) as source, zipfile.ZipFile(path, "w") as target:
                names = source.namelist()
                root = names[0].partition("/")[0]
                for name in names:
                    old = source.read(name)
                    target.writestr(name, change(old) if name == f"{root}/{member}" else old)
                if f"{root}/{member}" not in names:
                    target.writestr(f"{root}/{member}", change(b""))
            return path

        return planted

    def test_nothing_runs(self, plant, tmp_path):
        ran = tmp_path / "ran"
        hostile = pickle.dumps(Canary(ran))

        def edited(find, replace):
            def change(content):
                assert find in content, "the format of torch.export has changed: mend the test"
                return content.replace(find, replace)

            return change

        cases = [
            ("data/sample_inputs/model.pt", lambda _: hostile),
            ("data/weights/model_weights_config.json", edited(b'"use_pickle": false', b'"use_pickle": true')),
            ("data/constants/opaque_obj_0", lambda _: hostile),
            ("data/constants/custom_obj_0", lambda _: hostile),
            ("data/weights/model.pt", lambda _: hostile),
            ("data/aotinductor/model/model.so", lambda _: b"\x7fELF"),
            ("models/model.json", edited(b"torch.ops.aten.conv2d.default", b"torch.os.system")),
            ("models/model.json", edited(b'"expr_str": "', b'"expr_str": "__import__(\'os\').getpid() + ')),
        ]
        for member, change in cases:
            with pytest.raises(CheckpointError, match="runs no code and no pickle"):
                load_exported(str(plant(member, change)), "teacher")
            assert not ran.exists(), member

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_second_record_of_one_name_hides_nothing(self, plant, tmp_path):
        """zipfile examines the last one; another reader may take the first."""
        path = plant("extra/nothing", lambda _: b"")
        with zipfile.ZipFile(path) as archive:
            name = next(each for each in archive.namelist() if each.endswith("data/sample_inputs/model.pt"))
            harmless = archive.read(name)
        for content in (pickle.dumps(Canary(tmp_path / "ran")), harmless):
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=r"teacher.file: .* two records of one name"):
            load_exported(str(path), "teacher")
        assert not (tmp_path / "ran").exists()
