"""Files for other tools, from a packed or a float model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from carsam.data.images.normalisation import normalisation_of
from carsam.data.images.transforms import preprocessor_config
from carsam.errors import CarsamError, ConfigError
from carsam.export.layers import Lowered
from carsam.export.profile import Profile, Subject, profiles
from carsam.export.trace import Core, trace
from carsam.models.family import Family, family_of
from carsam.output.files import write_json
from carsam.output.finished import read_recipe
from carsam.output.target import Replacement
from carsam.pack.checkpoint import open_model, without_packing
from carsam.pack.folder import portable_path
from carsam.pack.source import packed_folder
from carsam.version import __version__

REPORT = "export.json"
FORMAT = "1"
# Protocol buffers hold 2 GB at most; beyond this, weights go into a file beside the graph's.
LARGEST_FILE = 1_900_000_000


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: Where.
        profile: For which tool.
        files: Bytes of every file.
        sites: How every quantized site came out, by half.
    """

    folder: str
    profile: str
    files: dict[str, int]
    sites: dict[str, tuple[Lowered, ...]]

    def share(self, kind: str = "layer") -> float:
        """Share of the multiply-accumulates of quantized layers (or attentions) that run in integers; 1 without any."""
        counted = [site for sites in self.sites.values() for site in sites if site.kind == kind]
        macs = sum(site.macs for site in counted)
        return sum(site.integer_macs for site in counted) / macs if macs else 1.0

    def reasons(self) -> dict[str, int]:
        """Why sites are not in integers: reason to multiply-accumulates."""
        found: dict[str, int] = {}
        for sites in self.sites.values():
            for site in sites:
                if site.reason:
                    key = f"{site.kind}s: {site.reason}"
                    found[key] = found.get(key, 0) + site.macs - site.integer_macs
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def export(
    source: str | Path,
    out: str | Path,
    profile: str = "onnx",
    *,
    overwrite: bool = False,
    normalise: str | None = None,
    image_size: int | None = None,
) -> Exported:
    """Writes a model as ONNX files for a tool.

    Args:
        source: Packed folder, or a float model as for :func:`carsam.load_model`.
        out: Folder to write.
        profile: See :func:`carsam.export.profile.profiles`.
        overwrite: Replace a folder that an earlier export wrote.
        normalise: See :func:`carsam.pack.checkpoint.open_model`.
        image_size: Likewise.

    Returns:
        What was written.

    Raises:
        ConfigError: There is no such profile, or it cannot honour the model.
        CarsamError: The model cannot be read; the folder is there, or cannot be written.
    """
    known = profiles()
    if profile not in known:
        raise ConfigError(f"there is no export profile {profile!r}; there are {', '.join(sorted(known))}.")
    out = Path(out)
    _check_place(out, source, overwrite)
    model = open_model(source, normalise=normalise, image_size=image_size)
    family = family_of(model)
    subject = describe(source, model, family, profile)
    names = family.halves(model).names
    known[profile].check(subject, names, family.image_size(model))
    core = trace(model, family, loops=known[profile].loops)
    return write(out, known[profile], subject, core)


def describe(source: str | Path, model: Any, family: Family, profile: str) -> Subject:
    """What files say of a model."""
    folder = packed_folder(source)
    name = PurePosixPath(portable_path(str(source).rstrip("/"))).stem or "sam"
    metadata = {"carsam.format": FORMAT, "carsam.version": __version__, "carsam.profile": profile}
    bits, method, base = "float", "none", name
    weight_bits = 16
    config = json.loads(model.config.to_json_string(use_diff=False))
    if folder is not None:
        packing = model.config.quantization_config
        bits, method = packing.bits, packing.method
        base = portable_path(str(read_recipe(folder).get("model") or "unknown"))
        weight_bits = max((spec["weight"] for spec in packing.layout["layers"].values()), default=16)
        config = without_packing(config)
    metadata |= {"carsam.bits": bits, "carsam.method": method, "carsam.source": base, "carsam.family": family.name}
    metadata["carsam.normalisation"] = normalisation_of(model).describe()
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "sam"
    title = f"{PurePosixPath(base).stem} {bits} ({method})" if folder is not None else f"{name} (float)"
    return Subject(
        slug,
        title,
        family.name,
        family.onnx_files,
        normalisation_of(model),
        weight_bits,
        config,
        preprocessor_config(model),
        metadata,
    )


def write(out: Path, profile: Profile, subject: Subject, core: Core) -> Exported:
    """Writes the files of a profile into a folder that appears whole."""
    files = profile.files(subject, core)
    sites = {"encoder": core.encoder.lowered, "decoder": core.decoder.lowered}
    for model in files.values():
        if isinstance(model, onnx.ModelProto):
            half = _property(model, "carsam.half")
            listed = json.dumps([asdict(site) for site in sites[half]], separators=(",", ":"))
            onnx.helper.set_model_props(model, {**_properties(model), "carsam.sites": listed})
    target = Path(out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with Replacement(target) as replacement:
            sizes = {}
            for name, content in files.items():
                path = replacement.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                _save(content, path)
                sizes[name] = path.stat().st_size
            for path in sorted(replacement.folder.rglob("*.data")):
                sizes[path.relative_to(replacement.folder).as_posix()] = path.stat().st_size
            result = Exported(str(out), profile.name, sizes, sites)
            write_json(replacement.folder / REPORT, report(result, subject))
    except OSError as error:
        raise CarsamError(f"cannot write {out}: {error.strerror or error}. Nothing was left there.") from error
    return result


def report(result: Exported, subject: Subject) -> dict[str, Any]:
    """What ``export.json`` holds."""
    return {**{key.removeprefix("carsam."): value for key, value in subject.metadata.items()}, **summary(result)}


def summary(result: Exported) -> dict[str, Any]:
    """An export in numbers."""
    return {
        "profile": result.profile,
        "files": result.files,
        "integer_share_of_layers": result.share(),
        "integer_share_of_attentions": result.share("attention"),
        "floating": result.reasons(),
        "sites": {half: [asdict(site) for site in sites] for half, sites in result.sites.items()},
    }


def _check_place(out: Path, source: str | Path, overwrite: bool) -> None:
    """Refuses a folder that is there, unless an export wrote it and it may be replaced.

    Raises:
        CarsamError: It is not to be written.
    """
    if Path(source).exists() and (
        out.resolve() == Path(source).resolve() or out.resolve() in Path(source).resolve().parents
    ):
        raise CarsamError(f"{out} is or holds the model {source}; choose another folder with --out.")
    if not out.exists():
        return
    if not overwrite:
        raise CarsamError(f"{out} exists already; choose another folder, or replace it with --overwrite.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file()):
        raise CarsamError(f"{out} was not written by carsam export, so it is not overwritten; choose another folder.")
    if foreign := sorted(_there(out) - _listed(out)):
        raise CarsamError(
            f"{out} holds files that carsam export did not write, so it is not overwritten: {', '.join(foreign[:5])}. "
            "Move them elsewhere, or choose another folder."
        )


def _there(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _listed(folder: Path) -> set[str]:
    try:
        files = json.loads((folder / REPORT).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {REPORT, *files} if isinstance(files, dict) else set()


def _save(content: onnx.ModelProto | str, path: Path) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
        return
    weight = sum(len(tensor.raw_data) for tensor in content.graph.initializer)
    if weight <= LARGEST_FILE:
        path.write_bytes(content.SerializeToString())
        return
    onnx.save_model(
        content, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data"
    )


def _properties(model: onnx.ModelProto) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def _property(model: onnx.ModelProto, name: str) -> str:
    return _properties(model)[name]
