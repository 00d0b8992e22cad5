"""The model behaves as transformers' SamModel does, and its attention can be quantized like the decoder's."""

import copy

import pytest
import torch
from tinyvit_state import SIDES, SMALL
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, SamModel

from carsam.models.attention import MatMulQuantizers, attach_matmul_quantizers
from carsam.models.implementations import IMPLEMENTATION
from carsam.models.tinyvit.configuration import TinyVitConfig, TinyVitSamConfig
from carsam.models.tinyvit.modeling import (
    TinyVitAttention,
    TinyVitBlock,
    TinyVitSamModel,
    bias_positions,
    join,
    partition,
)
from carsam.models.tinyvit.random import random_tinyvit, tinyvit_config

KINDS = ["mobilesam", "litemedsam"]
BOX = torch.tensor([[[2.0, 3.0, 20.0, 28.0], [0.0, 0.0, 9.0, 9.0]]])


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_tinyvit(request.param, SIDES[request.param], **SMALL)


def pixels(model, batch=1):
    side = model.config.vision_config.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(pixel_values=pixels(model), input_boxes=BOX, multimask_output=False).pred_masks


def test_it_is_a_sam_model(model):
    assert isinstance(model, SamModel)
    with torch.no_grad():
        embedding = model.get_image_embeddings(pixels(model))
        assert embedding.shape == (1, 256, 8, 8)
        assert model.get_image_wide_positional_embeddings().shape == (1, 256, 8, 8)
        output = model(image_embeddings=embedding, input_boxes=BOX)
    assert output.pred_masks.shape == (1, 2, 3, 32, 32)
    assert output.iou_scores.shape == (1, 2, 3)


def test_the_encoder_is_a_chain_of_single_tensors(model):
    encoder = model.vision_encoder
    with torch.no_grad():
        hidden = encoder.patch_embed(pixels(model, batch=2))
        assert hidden.shape == (2, 32, 32, 8)
        for layer in encoder.layers:
            assert hidden.is_contiguous()
            hidden = layer(hidden)
        assert hidden.shape == (2, 8, 8, 24)
        assert torch.equal(encoder.neck(hidden), model.get_image_embeddings(pixels(model, batch=2)))
    assert len(encoder.layers) == model.config.vision_config.num_hidden_layers == 8


def test_every_weight_is_of_a_plain_layer(model):
    plain = (nn.Conv2d, nn.Linear, nn.LayerNorm)
    owners = {name.rpartition(".")[0] for name, _ in model.vision_encoder.named_parameters()}
    modules = {name: model.vision_encoder.get_submodule(name) for name in owners}
    assert {type(m) for m in modules.values() if not isinstance(m, plain)} == {TinyVitAttention}
    assert not list(model.vision_encoder.buffers())


def test_another_image_size_is_refused(model):
    with pytest.raises(ValueError, match=r"Input image size \(16\*16\) doesn't match model"):
        model.get_image_embeddings(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("load", [AutoModel, TinyVitSamModel])
def test_it_survives_saving(model, tmp_path, load):
    model.save_pretrained(tmp_path)
    again = load.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is TinyVitSamModel
    assert not again.training
    assert again.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (logits(again) - logits(model)).abs().max() < 1e-6  # load may align memory otherwise
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config.vision_config) is TinyVitConfig
    assert config.vision_config.to_dict() == model.config.vision_config.to_dict()


def test_fused_attention_gives_the_same(model):
    fused = copy.deepcopy(model)
    fused.set_attn_implementation("sdpa")
    assert fused.vision_encoder.layers[2].attn.config._attn_implementation == "sdpa"
    assert (logits(fused) - logits(model)).abs().max() < 1e-5


class Softmax(nn.Module):
    """A softmax output without quantization; remembers the scores' shape."""

    def forward(self, scores, value):
        self.shape, self.values = tuple(scores.shape), tuple(value.shape)
        return scores.softmax(-1)


def test_matmul_quantizers_attach_as_to_the_decoder(model):
    quantized = copy.deepcopy(model)
    attention = quantized.vision_encoder.layers[2].attn
    attach_matmul_quantizers(attention, MatMulQuantizers(*(nn.Identity() for _ in range(3)), Softmax()))
    assert (logits(quantized) - logits(model)).abs().max() < 1e-5
    # 16 × 16 cells in windows of 7 × 7, padded: 9 windows of 49 tokens; 2 heads of 8 channels.
    assert attention.matmul.probs.shape == (9, 2, 49, 49)
    assert attention.matmul.probs.values == (9, 2, 49, 8)
    # What the user sets for the model must not take the quantizers out.
    quantized.set_attn_implementation("sdpa")
    assert attention.config._attn_implementation == IMPLEMENTATION
    attention.matmul.query = nn.Hardtanh(0.0, 0.01)
    assert (logits(quantized) - logits(model)).abs().max() > 1e-4


def test_biases_belong_to_distances():
    # The published order: each new distance, in the order in which pairs of tokens meet it, gets the next number.
    window = 3
    cells = [(row, column) for row in range(window) for column in range(window)]
    numbers: dict[tuple[int, int], int] = {}
    expected = [[numbers.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(numbers)) for b in cells] for a in cells]
    assert bias_positions(window).tolist() == expected


def test_windows_join_to_the_map_that_was_cut():
    maps = torch.arange(2 * 6 * 9 * 5).reshape(2, 6, 9, 5)
    windows = partition(maps, 3)
    assert windows.shape == (12, 9, 5)
    assert torch.equal(windows[1], maps[0, :3, 3:6].reshape(9, 5))
    assert torch.equal(join(windows, 3, maps.shape), maps)


@torch.no_grad()
def test_padding_comes_before_the_norm():
    config = TinyVitConfig(**SMALL)
    block = TinyVitBlock(config, 16, 2, 7).eval()
    nn.init.normal_(block.layer_norm1.bias)
    maps = torch.randn(1, 5, 6, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(maps)
    window = seen[0].reshape(7, 7, 16)
    assert torch.equal(window[:5, :6], block.layer_norm1(maps[0]))
    padded = torch.ones(7, 7, dtype=torch.bool)
    padded[:5, :6] = False
    assert torch.allclose(window[padded], block.layer_norm1.bias.expand(19, 16))
    # The attention sees the padding: without it the output is another one.
    bare = TinyVitBlock(config, 16, 2, 7).eval()
    bare.load_state_dict(block.state_dict())
    nn.init.zeros_(bare.layer_norm1.bias)
    assert not torch.allclose(bare(maps), block(maps))


@torch.no_grad()
def test_a_window_as_large_as_the_map_needs_no_padding():
    block = TinyVitBlock(TinyVitConfig(**SMALL), 16, 2, 5).eval()
    maps = torch.randn(2, 5, 5, 16, generator=torch.Generator().manual_seed(0))
    tokens = block.attn(block.layer_norm1(maps).reshape(2, 25, 16)).reshape(maps.shape)
    mixed = F.conv2d(
        (maps + tokens).permute(0, 3, 1, 2), block.local_conv.weight, block.local_conv.bias, padding=1, groups=16
    ).permute(0, 2, 3, 1)
    assert torch.allclose(block(maps), mixed + block.mlp(block.layer_norm2(mixed)), atol=1e-6)


def test_a_published_model_has_its_published_size():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in TinyVitSamModel(tinyvit_config("mobilesam")).parameters())
    assert parameters == 9_803_780  # with batch norms folded


def test_a_default_configuration_is_mobilesam():
    config = TinyVitSamConfig()
    assert config.vision_config.image_size == config.prompt_encoder_config.image_size == 1024
    assert config.prompt_encoder_config.image_embedding_size == 64
