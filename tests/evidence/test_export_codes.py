"""Exported files bit for bit: layers and attentions from exact sums, ONNX Runtime's operators between them."""

import numpy as np
import pytest
import torch
from small_models import small_model

from carsam.benchmark.nearest import nearest
from carsam.models.family import family_of
from carsam.models.forward import encode_image

pytest.importorskip("onnxruntime", reason="an optional package: carsam[onnx]")
import export_codes

from carsam.export.trace import trace_marks
from carsam.runtime.halves import Halves
from carsam.runtime.onnx import onnx_halves


@pytest.mark.parametrize(("name", "bits"), [("sam", "w8a8"), ("sam", "w4a4"), ("tinyvit", "w6a6")])
@torch.no_grad()
def test_files_compute_the_simulations_integers_to_the_last_bit(name, bits, tmp_path):
    generator = torch.Generator().manual_seed(0)
    model = small_model(name)
    side = family_of(model).image_size(model)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    model = nearest(model, bits, [pixels.numpy()])
    family = family_of(model)
    marked = trace_marks(model, family)
    halves = [export_codes.Interpreted(graph, marked.sites) for graph in (marked.encoder, marked.decoder)]
    files = onnx_halves(model, folder=tmp_path / "files")
    own = Halves(*halves, files.shapes, files.mask_side, "interpreted", files.box_ends_in_no_point)
    boxes = torch.tensor([[0.2, 0.2, 0.8, 0.7], [0.1, 0.5, 0.6, 0.9]]) * side
    # The same float operators on the same values: nothing may differ, whatever the steps.
    embedding = files.encode_image(pixels)
    assert torch.equal(own.encode_image(pixels), embedding)
    assert torch.equal(export_codes.masks_of(own, pixels, boxes), export_codes.masks_of(files, pixels, boxes))
    codes = {**halves[0].codes, **halves[1].codes}
    assert len(codes) > 30 and all(len(np.unique(each)) > 1 for each in codes.values())
    # PyTorch's norms and activations differ in the last bits, whatever it sums exactly.
    exact = export_codes.with_exact_sums(model)
    assert not torch.equal(encode_image(exact, pixels), embedding)
