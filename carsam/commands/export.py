"""``carsam export``: a model as files for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from carsam.commands.common import ImageSize, Normalise, complete_from, megabytes
from carsam.commands.output import Json, Output, Quiet

if TYPE_CHECKING:
    from carsam.export.check import Proof
    from carsam.export.export import Exported

# Completed without importing torch.
PROFILES = ("onnx", "openvino", "osam", "samexporter", "transformers.js", "x-anylabeling")


def export(
    model: Annotated[
        str, typer.Argument(help="Packed folder, or a float model as for carsam quantize.", show_default=False)
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    profile: Annotated[
        str,
        typer.Option(
            help="Tool that reads the files: onnx (ONNX Runtime, your programs), openvino, x-anylabeling, samexporter, "
            "transformers.js or osam (labelme).",
            metavar="TOOL",
            autocompletion=complete_from(*PROFILES),
        ),
    ] = "onnx",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run the files once with ONNX Runtime, and fail unless 95 % of the quantized layers' "
            "multiply-accumulates run in integer kernels.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier export wrote.")] = False,
    json: Json = None,
    quiet: Quiet = False,
    normalise: Normalise = None,
    image_size: ImageSize = None,
) -> None:
    """Write a model as ONNX files for other tools; quantized layers run in integers there."""
    from carsam.export.requirements import require_onnx, require_runtime

    require_onnx()
    if check:
        require_runtime()
    from carsam.export.check import check_share, prove
    from carsam.export.export import export as write
    from carsam.export.export import summary

    output = Output(json, quiet=quiet)
    result = write(model, folder, profile, overwrite=overwrite, normalise=normalise, image_size=image_size)
    for line in _lines(result):
        output.line(line)
    proofs = [prove(folder / name) for name in result.files if name.endswith(".onnx")] if check else []
    for proof in proofs:
        output.line(_proof_line(proof))
    output.save({**summary(result), "proofs": [asdict(proof) for proof in proofs]})
    check_share(proofs)


def _lines(result: Exported) -> list[str]:
    lines = [f"{result.folder}/{name}: {megabytes(size)}" for name, size in result.files.items()]
    if any(result.sites.values()):
        lines.append(
            f"in integers: {100 * result.share():.1f} % of the quantized layers' multiply-accumulates, "
            f"{100 * result.share('attention'):.1f} % of the attentions'"
        )
    total = sum(site.macs for sites in result.sites.values() for site in sites)
    lines += [f"in floating point: {100 * macs / total:.1f} % of all, {why}" for why, macs in result.reasons().items()]
    return lines


def _proof_line(proof: Proof) -> str:
    if not proof.macs:
        return f"{proof.file}: nothing in it is quantized"
    return (
        f"{proof.file}: ONNX Runtime executed {100 * proof.share:.1f} % of the quantized layers' multiply-accumulates "
        f"in integer kernels ({proof.integer / 1e6:.0f} of {proof.macs / 1e6:.0f} million)"
    )
