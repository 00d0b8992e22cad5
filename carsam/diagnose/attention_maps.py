"""Attention dissipation (METHOD.md, 10): the softmax outputs of both models, compared as they come and not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carsam.diagnose.measures import dead_rows, entropy, focus_overlap, kl_divergence
from carsam.diagnose.results import AttentionResult, Dissipation
from carsam.models.sites import Sites
from carsam.quantizers import simulate
from carsam.quantizers.sampling import odd_step_within

# Softmax outputs of one head that are kept from one pass. A global attention of ViT-B at 1024 px has 16 times as many;
# every 17th query then stands for all of them.
MAP_ELEMENTS = 2**20


class MapRecorder:
    """Collects the softmax outputs of a model's attentions while a ``with recorder.recording()`` block runs it.

    Args:
        model: Packed, or in float form.
        sites: Its sites.

    Attributes:
        queries: Number of queries of each attention seen, before striding.
    """

    def __init__(self, model: nn.Module, sites: Sites):
        self.queries: dict[str, int] = {}
        self._probs = {site.name: model.get_submodule(site.name).matmul.probs for site in sites.attentions}
        self._heads = {site.name: model.get_submodule(site.name).num_attention_heads for site in sites.attentions}
        self._chunks: dict[str, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[MapRecorder]:
        """Records every pass inside the block."""

        def hook_for(name: str):
            def keep(_module: nn.Module, _args: tuple, output: Tensor) -> None:
                self.queries[name] = output.shape[-2]
                rows = output[..., :: query_stride(*output.shape[-2:]), :]
                self._chunks.setdefault(name, []).append(rows.clone())

            return keep

        handles = [module.register_forward_hook(hook_for(name)) for name, module in self._probs.items()]
        try:
            with simulate(whole_heads=True):
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, Tensor]:
        """What came since the last call: (batch, heads, queries, keys) by attention, queries strided."""
        taken = {}
        for name, chunks in self._chunks.items():
            # The encoder hands over (batch · heads, queries, keys) in chunks, heads fastest.
            rows = torch.cat(chunks)
            taken[name] = rows.reshape(-1, self._heads[name], *rows.shape[-2:])
        self._chunks = {}
        return taken


def query_stride(queries: int, keys: int) -> int:
    """Step between the queries that are kept."""
    return odd_step_within(queries * keys, MAP_ELEMENTS)


@dataclass
class _Sums:
    keys: int
    sums: Tensor
    count: int = 0


@dataclass
class DissipationMeter:
    """Sums of the measures over images, prompts, windows and queries, by attention and head."""

    sites: Sites
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def update(self, name: str, probs: Tensor, quantized: Tensor, valid: Tensor | None = None) -> None:
        """Takes the maps of one attention.

        Args:
            name: The attention.
            probs, quantized: (batch, heads, queries, keys) of the float and of the quantized model.
            valid: (batch, queries) bool, those to count; None for all.
        """
        measures = torch.stack(
            [
                entropy(probs),
                entropy(quantized),
                kl_divergence(probs, quantized),
                focus_overlap(probs, quantized),
                quantized.sum(-1),
                dead_rows(quantized).to(probs.dtype),
            ]
        )
        if valid is None:
            valid = torch.ones(probs.shape[0], probs.shape[2], dtype=torch.bool)
        valid = valid.to(measures.device)
        total = (measures.double() * valid[:, None]).sum((1, 3)).cpu()
        entry = self._sums.setdefault(name, _Sums(probs.shape[-1], torch.zeros_like(total)))
        entry.sums += total
        entry.count += int(valid.sum())

    def results(self, queries: dict[str, int]) -> tuple[AttentionResult, ...]:
        """The attentions that were seen, in execution order; ``queries`` are those of a :class:`MapRecorder`."""
        results = []
        for site in self.sites.attentions:
            if site.name not in self._sums:
                continue
            entry = self._sums[site.name]
            means = entry.sums / entry.count  # (measures, heads)
            heads = tuple(_dissipation(column) for column in means.T.tolist())
            stage = "decoder" if self.sites.in_decoder(site.name) else "encoder"
            mean = _dissipation(means.mean(1).tolist())
            results.append(AttentionResult(site.name, stage, queries[site.name], entry.keys, mean, heads))
        return tuple(results)


def _dissipation(values: list[float]) -> Dissipation:
    floating, quantized, kl, overlap, row_sum, dead = values
    return Dissipation(floating, quantized, quantized - floating, kl, overlap, row_sum, dead)
