"""What the quantizers of softmax outputs P have in common: they take the scores, and the second MatMul reads P̂."""

from __future__ import annotations

from torch import Tensor

from carsam.quantizers.grid import Grid
from carsam.quantizers.site import SiteQuantizer


class SoftmaxQuantizer(Grid):
    """softmax with a quantized output.

    Called as ``quantizer(scores, value=V)``: which granularity serves best depends on what P is multiplied with. One
    whose range is calibrated is a :class:`SiteQuantizer` as well, or holds one.
    """

    def site_quantizer(self) -> SiteQuantizer | None:
        """The quantizer that is given P as it is: this one, or one inside; None where codes follow from the scores."""
        return self if isinstance(self, SiteQuantizer) else None

    def forward(self, scores: Tensor, value: Tensor | None = None) -> Tensor:
        """Quantized attention (..., queries, keys).

        Args:
            scores: (..., queries, keys), before the softmax.
            value: (..., keys, dim), what P is multiplied with.
        """
        raise NotImplementedError
