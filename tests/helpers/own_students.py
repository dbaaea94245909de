"""Students that kdpipe did not write: their section of a configuration, and what they predict in a script without kdpipe."""

from pathlib import Path

import numpy as np
import torch
from helpers.foreign_networks import Pooled, names, save_transformers

KINDS = ("model", "segformer")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CODE = """\
from pathlib import Path
from helpers.foreign_networks import Pooled
Path("imported").touch()
build = Pooled
"""


def student_of(kind: str, folder: Path) -> dict[str, object]:
    """The section `student` of a configuration for a network of this kind and six classes, whose files are written into `folder`."""
    if kind == "model":
        return {"model": "helpers.foreign_networks:Pooled", "options": {"num_classes": 6}}
    return {"pretrained": str(save_transformers(kind, folder / kind))}


def owners_network(kind: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network by its own library, with the weights of a checkpoint; from normalised images to logits of a lower resolution."""
    if kind == "model":
        network, prefix, logits_of = Pooled(6), "student.network.", lambda output: output["out"]
    else:
        import transformers as tf

        config = tf.SegformerConfig(
            hidden_sizes=[8, 16, 16, 16],
            depths=[1] * 4,
            num_attention_heads=[1] * 4,
            decoder_hidden_size=16,
            **names(6),
        )
        network, prefix = tf.SegformerForSemanticSegmentation(config), "student.network.network."
        logits_of = lambda output: output.logits  # noqa: E731
    network.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    network.eval()
    return lambda inputs: logits_of(network(inputs))


def owners_probabilities(network, image_HW3: np.ndarray) -> np.ndarray:
    """Probabilities `(C, H, W)` of one image, by the steps of the documentation: mirror to multiples of 32 px, normalise, enlarge."""
    height, width = image_HW3.shape[:2]
    padded = np.pad(image_HW3, ((0, -height % 32), (0, -width % 32), (0, 0)), mode="reflect")
    inputs = torch.from_numpy((padded / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        logits = network(inputs)
        logits = torch.nn.functional.interpolate(logits, size=padded.shape[:2], mode="bilinear", align_corners=False)
    return logits[0, :, :height, :width].softmax(dim=0).numpy()
