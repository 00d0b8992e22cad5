"""Softmax outputs: taken head by head from both kinds of attention, compared row by row."""

import math

import pytest
import torch
from torch.nn import functional as F

import carsam.diagnose.attention_maps as attention_maps
import carsam.models.attention as attention_module
from carsam.diagnose.attention_maps import DissipationMeter, MapRecorder, query_stride
from carsam.diagnose.measures import focus_overlap, kl_divergence
from carsam.models.sam.encoder import enter_encoder, valid_queries
from carsam.predict.predictor import predict_logits


def take(pair, sample, stages=2):
    """Maps of the float model's first encoder stages."""
    recorder = MapRecorder(pair.reference, pair.sites)
    with torch.no_grad(), recorder.recording():
        encoder, _ = pair.sites.family.parts(pair.sites)
        values = encoder.enter(pair.reference, {}, sample)
        for stage in encoder.stages[:stages]:
            values = stage.run(pair.reference, values)
    return recorder, recorder.take()


def test_encoder_maps_are_softmax_of_its_scores(pair, samples, nano):
    """Against transformers' own attention, windows and heads in place."""
    recorder, maps = take(pair, samples[0])
    block = nano.vision_encoder.layers[0]
    attention = block.attn
    with torch.no_grad():
        hidden = block.layer_norm1(enter_encoder(nano, {}, samples[0])["hidden_states"])
        windows, _ = block.window_partition(hidden, block.window_size)
        count, side = windows.shape[0], block.window_size
        heads, tokens = attention.num_attention_heads, side * side
        qkv = attention.qkv(windows).reshape(count, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, _ = qkv.reshape(3, count * heads, tokens, -1).unbind(0)
        scores = query * attention.scale @ key.transpose(-2, -1)
        bias = attention.get_decomposed_rel_pos(
            query, attention.rel_pos_h, attention.rel_pos_w, (side, side), (side, side)
        )
        expected = F.softmax(scores + bias.reshape_as(scores), dim=-1).reshape(count, heads, tokens, tokens)
    name = pair.sites.attentions[0].name
    assert recorder.queries[name] == tokens
    torch.testing.assert_close(maps[name], expected, rtol=1e-4, atol=1e-6)


def test_chunks_are_put_together(pair, samples, monkeypatch):
    _, whole = take(pair, samples[0])
    monkeypatch.setattr(attention_module, "CHUNK_ELEMENTS", 2 * 256**2)
    _, chunked = take(pair, samples[0])
    assert [site.name for site in pair.sites.attentions[:2]] == list(whole) == list(chunked)
    for name, probs in whole.items():
        torch.testing.assert_close(chunked[name], probs)
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


def test_decoder_maps(pair, samples, nano):
    sample = samples[0]
    recorder = MapRecorder(pair.reference, pair.sites)
    with torch.no_grad():
        embedding = nano.get_image_embeddings(sample.pixel_values)
        with recorder.recording():
            logits, _ = predict_logits(pair.reference, embedding, boxes=sample.boxes)
    maps = recorder.take()
    block = "mask_decoder.transformer.layers"
    tokens = 1 + 4 + 2  # IoU, masks, corners of the box
    assert maps[f"{block}.0.self_attn"].shape == (2, 8, tokens, tokens)
    assert maps[f"{block}.0.cross_attn_token_to_image"].shape == (2, 8, tokens, 256)
    assert maps[f"{block}.1.cross_attn_image_to_token"].shape == (2, 8, 256, tokens)
    assert maps[pair.sites.focus[-1]].shape == (2, 8, tokens, 256)
    assert recorder.take() == {}
    # The float form computes what the float model does.
    expected, _ = predict_logits(nano, embedding, boxes=sample.boxes)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_queries_are_strided_where_maps_are_large(pair, samples, monkeypatch):
    monkeypatch.setattr(attention_maps, "MAP_ELEMENTS", 2**12)
    recorder, maps = take(pair, samples[0])
    name = pair.sites.attentions[1].name
    assert recorder.queries[name] == 256
    assert maps[name].shape[-2:] == (math.ceil(256 / 17), 256)
    assert query_stride(4, 4) == 1
    assert query_stride(64, 128) % 2 == 1


def test_padding_of_windows_does_not_count(nano):
    windowed, whole = nano.vision_encoder.layers[0], nano.vision_encoder.layers[1]
    valid = valid_queries(windowed, 16, 16)
    assert valid.shape == (9, 49)
    assert valid.sum() == 256
    assert valid[0].all()
    assert valid[8].sum() == 4  # the corner window holds 2 × 2 of the grid
    assert valid_queries(whole, 16, 16) is None
    assert valid_queries(nano.vision_encoder.neck, 16, 16) is None


def test_meter_is_the_mean_over_rows(pair):
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(3 * torch.randn(4, 2, 6, 5, generator=generator), -1)
    quantized = (probs * 3).round() / 3
    valid = torch.rand(4, 6, generator=generator) < 0.6
    name = pair.sites.focus[-1]
    meter = DissipationMeter(pair.sites)
    for part in (slice(0, 1), slice(1, 4)):
        meter.update(name, probs[part], quantized[part], valid[part])
    (result,) = meter.results({name: 6})
    assert (result.name, result.stage, result.queries, result.keys) == (name, "decoder", 6, 5)
    kl = kl_divergence(probs, quantized).transpose(1, 2)[valid].mean(0)
    overlap = focus_overlap(probs, quantized).transpose(1, 2)[valid].mean(0)
    assert [head.kl for head in result.heads] == pytest.approx(kl.tolist(), rel=1e-5)
    assert [head.focus_overlap for head in result.heads] == pytest.approx(overlap.tolist(), rel=1e-5)
    assert result.mean.kl == pytest.approx(kl.mean().item(), rel=1e-5)


def test_a_model_against_itself(pair):
    probs = torch.softmax(torch.randn(2, 8, 7, 9), -1)
    meter = DissipationMeter(pair.sites)
    meter.update(pair.sites.focus[-1], probs, probs)
    mean = meter.results({pair.sites.focus[-1]: 7})[0].mean
    assert (mean.entropy_change, mean.kl, mean.focus_overlap, mean.dead_rows) == (0, 0, 1, 0)
    assert mean.row_sum == pytest.approx(1)


def test_packed_model_dissipates(passes, pair):
    assert [each.name for each in passes.attentions] == [site.name for site in pair.sites.attentions]
    assert [each.stage for each in passes.attentions] == ["encoder"] * 8 + ["decoder"] * 7
    for each in passes.attentions:
        assert len(each.heads) == (3 if each.stage == "encoder" else 8)
        assert each.mean.kl > 0.01
        assert 0 < each.mean.focus_overlap < 1
        assert each.mean.entropy_change == pytest.approx(each.mean.entropy_quantized - each.mean.entropy_float)
        assert 0 < each.mean.row_sum < 1.3
        values = each.to_dict()
        assert values["kl"] == pytest.approx(sum(head["kl"] for head in values["heads"]) / len(values["heads"]), 1e-4)
