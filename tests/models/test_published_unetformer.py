"""UNetFormer takes published weights, and computes what a network written out by hand computes with them."""

import json

import pytest
import torch
from helpers.golden import golden_value
from torch.nn import functional as F

from kdpipe.configs.errors import CheckpointError
from kdpipe.pipeline.models.student import load_student_weights
from kdpipe.pipeline.models.unetformer import UNetFormer
from kdpipe.pipeline.models.weights import load_strictly

WIDTH, HEADS, WINDOW = 64, 8, 8
SIZE = (256, 320)  # 8 x 10 at stride 32: whole windows in one direction, and the published reflection fits in the other


def golden(shapes):
    """A state dict of these names and shapes with golden values; position indices are counted out."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("relative_position_index"):
            at = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
            apart = at[:, :, None] - at[:, None, :] + WINDOW - 1
            state[name] = apart[0] * (2 * WINDOW - 1) + apart[1]
        else:
            state[name] = golden_value(name, shape)
    return state


class ByHand:
    """UNetFormer in eval mode as its paper and the layout of its weights describe it, from functions alone."""

    def __init__(self, state):
        self.state = state

    def conv(self, x, name, **options):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)

    def norm(self, x, name):
        mean, var, weight, bias = (self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    def conv_norm(self, x, name, **options):
        return self.norm(self.conv(x, f"{name}.0", **options), f"{name}.1")

    def backbone(self, x):
        x = F.relu(self.norm(self.conv(x, "backbone.conv1", stride=2), "backbone.bn1"))
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for layer in range(1, 5):
            for block in range(2):
                name = f"backbone.layer{layer}.{block}"
                stride = 2 if layer > 1 and block == 0 else 1
                y = F.relu(self.norm(self.conv(x, f"{name}.conv1", stride=stride), f"{name}.bn1"))
                y = self.norm(self.conv(y, f"{name}.conv2"), f"{name}.bn2")
                x = F.relu(y + (self.conv_norm(x, f"{name}.downsample", stride=2) if stride == 2 else x))
            features.append(x)
        return features

    def windows(self, x, name):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % WINDOW, 0, -height % WINDOW), mode="reflect")
        qkv, out = self.conv(x, f"{name}.qkv.0"), torch.zeros_like(x)
        bias = self.state[f"{name}.relative_position_bias_table"][self.state[f"{name}.relative_position_index"]]
        for top in range(0, x.shape[-2], WINDOW):
            for left in range(0, x.shape[-1], WINDOW):
                at = (..., slice(top, top + WINDOW), slice(left, left + WINDOW))
                # (N, qkv, head, dim, position): channels are ordered so.
                q, k, v = qkv[at].reshape(len(x), 3, HEADS, WIDTH // HEADS, WINDOW**2).unbind(1)
                scores = torch.einsum("nhdp,nhdq->nhpq", q, k) / (WIDTH // HEADS) ** 0.5 + bias.permute(2, 0, 1)
                values = torch.einsum("nhpq,nhdq->nhdp", scores.softmax(-1), v)
                out[at] = values.reshape(len(x), WIDTH, WINDOW, WINDOW)
        return out[..., :height, :width]

    def attention(self, x, name):
        height, width = x.shape[-2:]
        out = self.windows(x, name)
        out = F.avg_pool2d(F.pad(out, (0, 0, 0, 1), mode="reflect"), (WINDOW, 1), 1, (3, 0)) + F.avg_pool2d(
            F.pad(out, (0, 1, 0, 0), mode="reflect"), (1, WINDOW), 1, (0, 3)
        )
        out = out + self.conv_norm(x, f"{name}.local1") + self.conv_norm(x, f"{name}.local2")
        out = F.pad(out, (0, 1, 0, 1), mode="reflect")
        out = F.conv2d(out, self.state[f"{name}.proj.0.weight"], padding=3, groups=WIDTH)
        out = self.conv(self.norm(out, f"{name}.proj.1"), f"{name}.proj.2")
        return out[..., :height, :width]

    def block(self, x, name):
        x = x + self.attention(self.norm(x, f"{name}.norm1"), f"{name}.attn")
        y = F.relu6(self.conv(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.conv(y, f"{name}.mlp.fc2")

    def fusion(self, x, skip, name):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        a, b = F.relu(self.state[f"{name}.weights"])
        x = (a * self.conv(skip, f"{name}.pre_conv.0") + b * x) / (a + b + 1e-8)
        return F.relu6(self.conv_norm(x, f"{name}.post_conv"))

    def refinement(self, x, skip, name):
        x = self.fusion(x, skip, name)
        pa = torch.sigmoid(self.conv(x, f"{name}.pa.0", groups=WIDTH))
        ca = torch.sigmoid(
            self.conv(F.relu6(self.conv(x.mean((2, 3), keepdim=True), f"{name}.ca.1.0")), f"{name}.ca.3.0")
        )
        y = self.conv(pa * x + ca * x, f"{name}.proj.0", groups=WIDTH)
        y = self.conv(self.norm(y, f"{name}.proj.1"), f"{name}.proj.2")
        return F.relu6(y + self.conv_norm(x, f"{name}.shortcut"))

    def __call__(self, images):
        """The logits, and those of the auxiliary head."""

        def resized(x):
            return F.interpolate(x, images.shape[-2:], mode="bilinear", align_corners=False)

        stride4, stride8, stride16, stride32 = self.backbone(images)
        x4 = self.block(self.conv_norm(stride32, "decoder.pre_conv"), "decoder.b4")
        x3 = self.block(self.fusion(x4, stride16, "decoder.p3"), "decoder.b3")
        x2 = self.block(self.fusion(x3, stride8, "decoder.p2"), "decoder.b2")
        x = F.relu6(self.conv_norm(self.refinement(x2, stride4, "decoder.p1"), "decoder.segmentation_head.0"))
        total = x2 + sum(F.interpolate(y, x2.shape[-2:], mode="bilinear", align_corners=True) for y in (x4, x3))
        auxiliary = self.conv(F.relu6(self.conv_norm(total, "decoder.aux_head.conv")), "decoder.aux_head.conv_out.0")
        return resized(self.conv(x, "decoder.segmentation_head.2.0")), resized(auxiliary)


def test_the_published_state_dict_loads_strictly_with_its_auxiliary_head(dubai):
    shapes = json.loads((dubai / "golden" / "unetformer_r18_keys.json").read_text())
    state = golden(shapes)
    model = UNetFormer(6)
    model.load_published_state_dict({"state_dict": {f"net.{name}": value for name, value in state.items()}})
    loaded = model.state_dict()
    assert {name: list(value.shape) for name, value in loaded.items()} == shapes
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_unetformer_computes_what_a_network_written_by_hand_computes():
    model = UNetFormer(6).eval()
    state = golden({name: value.shape for name, value in model.state_dict().items()})
    load_strictly(model, state, origin="golden weights")
    torch.manual_seed(1)
    images = torch.randn(1, 3, *SIZE)
    # With the auxiliary head, but without dropout and batch statistics.
    model.training = model.decoder.training = True
    with torch.inference_mode():
        outputs, expected = model(images), ByHand(state)(images)
        alone = model.eval()(images)
    assert torch.equal(alone, outputs[0])
    for found, wanted in zip(outputs, expected, strict=True):
        assert wanted.std() > 0.05
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)  # 3e-6 was measured, logits reach 5


def earlier(state):
    """The weights as an earlier kdpipe saved them: in every `proj` the 1x1 conv is number 1 and the norm number 2."""
    swapped = {".proj.1.": ".proj.2.", ".proj.2.": ".proj.1."}
    found = {}
    for name, value in state.items():
        part = next((part for part in swapped if part in name), None)
        found[name.replace(part, swapped[part]) if part else name] = value
    return found


def test_weights_of_the_earlier_order_are_refused_with_the_reason(tmp_path):
    model = UNetFormer(6)
    state = earlier(model.state_dict())
    assert set(state) != set(model.state_dict())
    reason = r"\. These are the weights of a UNetFormer that an earlier kdpipe trained: .* train the student again"
    with pytest.raises(CheckpointError, match=reason):
        load_strictly(model, state, origin="last.ckpt")
    torch.save({"state_dict": {f"student.{name}": value for name, value in state.items()}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=reason):
        load_student_weights(model, tmp_path / "old.ckpt")
    del state["decoder.p1.proj.2.running_var"]
    with pytest.raises(CheckpointError) as refused:
        load_strictly(model, state, origin="last.ckpt")
    assert "earlier kdpipe" not in str(refused.value)
