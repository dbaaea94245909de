"""Tiny real networks that kdpipe did not write: transformers built from a configuration, exported files, a module of one's own."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background"]
OWN_MODULE = """\
import torch
from torch import nn


class Pooled(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        return {"out": self.head(torch.relu(self.stem(x))), "aux": x}


def build(width=8, classes=8):
    return Pooled(width, classes)
"""


def names(count):
    return {"id2label": {i: f"c{i}" for i in range(count)}, "label2id": {f"c{i}": i for i in range(count)}}


def save_transformers(kind: str, folder: Path, classes: int = 8) -> Path:
    """Write a tiny network of transformers with random weights, and its image processor, as `save_pretrained` does."""
    import transformers as tf

    torch.manual_seed(0)
    tf.logging.disable_progress_bar()
    named = names(classes)
    square, side = {"size": {"height": 64, "width": 64}}, {"size": {"shortest_edge": 64, "longest_edge": 128}}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = tf.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64, out_features=stages
    )
    masks = {"backbone_config": swin, "num_queries": 5, **named}
    if kind == "segformer":
        config = tf.SegformerConfig(
            hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16, **named
        )
        model, processor = tf.SegformerForSemanticSegmentation(config), tf.SegformerImageProcessor(**square)
    elif kind == "upernet":
        convnext = tf.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, out_features=stages)
        config = tf.UperNetConfig(
            backbone_config=convnext,
            hidden_size=16,
            pool_scales=[1, 2],
            auxiliary_in_channels=16,
            auxiliary_channels=16,
            **named,
        )
        model, processor = tf.UperNetForSemanticSegmentation(config), tf.SegformerImageProcessor(**square)
    elif kind == "dpt":
        config = tf.DPTConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, is_hybrid=False,
            reassemble_factors=[4, 2, 1, 0.5], use_auxiliary_head=False, **named,
        )  # fmt: skip
        model, processor = tf.DPTForSemanticSegmentation(config), tf.DPTImageProcessor(**square)
    elif kind == "beit":
        config = tf.BeitConfig(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=64,
            out_indices=[1, 2, 3, 4], use_relative_position_bias=True, pool_scales=[1, 2], use_auxiliary_head=False, **named,
        )  # fmt: skip
        model, processor = tf.BeitForSemanticSegmentation(config), tf.BeitImageProcessor(do_center_crop=False, **square)
    elif kind == "mask2former":
        config = tf.Mask2FormerConfig(
            feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
            decoder_layers=2, num_attention_heads=2, dim_feedforward=16, **masks,
        )  # fmt: skip
        model, processor = tf.Mask2FormerForUniversalSegmentation(config), tf.Mask2FormerImageProcessor(**side)
    else:
        assert kind == "oneformer"
        return _save_oneformer(folder, masks, side, classes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def library_network(kind: str, folder: Path) -> torch.nn.Module:
    """The network of a folder as transformers alone loads it, for evaluation."""
    import transformers as tf

    of_masks = kind in ("mask2former", "oneformer")
    auto = tf.AutoModelForUniversalSegmentation if of_masks else tf.AutoModelForSemanticSegmentation
    return auto.from_pretrained(folder).eval()


def task_tokens(kind: str, folder: Path, count: int) -> dict[str, torch.Tensor]:
    """What OneFormer is given beside `count` images, by its own processor; nothing for other networks."""
    if kind != "oneformer":
        return {}
    import numpy as np
    import transformers as tf

    processor = tf.AutoProcessor.from_pretrained(folder)
    found = processor(images=[np.zeros((8, 8, 3), np.uint8)] * count, task_inputs=["semantic"] * count)
    return {"task_inputs": found["task_inputs"]}


def _save_oneformer(folder: Path, masks: dict, side: dict, classes: int) -> Path:
    import transformers as tf

    folder.mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", "the</w>", "task</w>", "is</w>", "semantic</w>"]
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {word: i for i, word in enumerate(words + letters)}
    aside = folder.with_name(f"{folder.name}-tokenizer")
    aside.mkdir()
    (aside / "vocab.json").write_text(json.dumps(vocabulary))
    (aside / "merges.txt").write_text("#version: 0.2\n")
    (aside / "classes.json").write_text(json.dumps({str(i): {"name": f"c{i}", "isthing": 0} for i in range(classes)}))
    tokenizer = tf.CLIPTokenizer(str(aside / "vocab.json"), str(aside / "merges.txt"), model_max_length=77)
    config = tf.OneFormerConfig(
        conv_dim=32, mask_dim=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, text_encoder_width=32, text_encoder_num_layers=1,
        text_encoder_vocab_size=len(vocabulary), is_training=False, **masks,
    )  # fmt: skip
    images = tf.OneFormerImageProcessor(
        repo_path=str(aside), class_info_file="classes.json", num_labels=classes, num_text=0, **side
    )
    tf.OneFormerForUniversalSegmentation(config).save_pretrained(folder)
    tf.OneFormerProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def export(model: torch.nn.Module, path: Path, size: int | None = None, bands: int = 3) -> Path:
    """Export a network to `.onnx` or `.pt2`: for any number of images and multiples of 32 px, or for one image of `size` px."""
    shape = (2, bands, 64, 96) if size is None else (1, bands, size, size)
    if path.suffix == ".onnx":
        any_size = {0: "n", 2: "h", 3: "w"}
        axes = {"image": any_size, "logits": any_size} if size is None else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises against the exporter that needs no further package
            torch.onnx.export(
                model,
                (torch.zeros(shape),),
                path,
                input_names=["image"],
                output_names=["logits"],
                dynamo=False,
                dynamic_axes=axes,
            )
        return path
    dim = torch.export.Dim
    varying = {0: dim("n"), 2: 32 * dim("h", min=1, max=64), 3: 32 * dim("w", min=1, max=64)}
    program = torch.export.export(model, (torch.zeros(shape),), dynamic_shapes=None if size else (varying,))
    torch.export.save(program, path)
    return path


class Pooled(torch.nn.Module):
    """A network of one's own that returns a mapping with coarser logits, as torchvision's do; `teacher.model` names it in the tests."""

    def __init__(self, num_classes: int = 8) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Conv2d(8, num_classes, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"aux": x, "out": self.head(torch.relu(self.norm(self.stem(x))))}


def teacher_of(kind: str, folder: Path) -> dict[str, object]:
    """The section `teacher` of a configuration for a network of this kind, whose files are written into `folder`."""
    torch.manual_seed(0)
    given: dict[str, object] = {"classes": CLASSES}
    if kind == "model":
        network = Pooled()
        with torch.no_grad():
            network.head.weight *= 8  # else the predictions are flat
        torch.save(network.state_dict(), folder / "pooled.pth")
        return given | {"model": "helpers.foreign_networks:Pooled", "checkpoint": str(folder / "pooled.pth")}
    if kind in ("onnx", "pt2"):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, stride=2, padding=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1)
        ).eval()
        with torch.no_grad():
            network[-1].weight *= 8
        return given | {"file": str(export(network, folder / f"teacher.{kind}"))}
    return given | {"pretrained": str(save_transformers(kind, folder / kind))}


def owners_logits(teacher: dict[str, object], image_HW3: np.ndarray) -> np.ndarray:
    """Logits `(8, H, W)` of one image, by the library of the network's own kind and nothing of kdpipe."""
    if "pretrained" in teacher:
        return _logits_of_transformers(teacher["pretrained"], image_HW3)
    height, width = image_HW3.shape[:2]
    padded = np.pad(image_HW3, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="reflect")
    x = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        if "architecture" in teacher:
            import segmentation_models_pytorch as smp

            network = smp.Unet(teacher["encoder"], encoder_weights=None, classes=8).eval()
            network.load_state_dict(torch.load(teacher["checkpoint"], weights_only=True))
            logits = network(x)
        elif "model" in teacher:
            network = Pooled().eval()
            network.load_state_dict(torch.load(teacher["checkpoint"], weights_only=True))
            logits = network(x)["out"]
        elif teacher["file"].endswith(".onnx"):
            import onnxruntime

            (output,) = onnxruntime.InferenceSession(teacher["file"]).run(None, {"image": x.numpy()})
            logits = torch.from_numpy(output)
        else:
            logits = torch.export.load(teacher["file"]).module()(x)
    logits = torch.nn.functional.interpolate(logits, size=padded.shape[:2], mode="bilinear", align_corners=False)
    return logits[0, :, :height, :width].numpy()


def _logits_of_transformers(folder: str, image_HW3: np.ndarray) -> np.ndarray:
    """Logits of a semantic network; of one that scores masks, the logarithms of its scores."""
    import transformers as tf

    scores_masks = "universal" in json.loads((Path(folder) / "config.json").read_text())["architectures"][0].lower()
    auto = tf.AutoModelForUniversalSegmentation if scores_masks else tf.AutoModelForSemanticSegmentation
    network = auto.from_pretrained(folder).eval()
    processor = tf.AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        outputs = network(**processor(images=[Image.fromarray(image_HW3)], return_tensors="pt"))
    size = [image_HW3.shape[:2]]
    (found,) = processor.post_process_semantic_segmentation(outputs, target_sizes=size, return_segmentation_scores=True)
    scores = found["segmentation_scores"].numpy()
    return np.log(scores) if scores_masks else scores
