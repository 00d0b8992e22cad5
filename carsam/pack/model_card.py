"""The model card: ``README.md`` of a packed folder, which the Hub shows."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from carsam.bits.plan import stated_bits
from carsam.errors import CarsamError
from carsam.models.names import Names, names_of_type
from carsam.output.files import write_text
from carsam.pack.folder import CARD, is_stand_in, portable
from carsam.reading import read_text

# What stands between these is written again when the model is measured; the rest of the card is the user's.
BEGIN, END = "<!-- carsam: scores -->", "<!-- carsam: end of scores -->"
HUB_URL = "https://huggingface.co/"
TAGS = ("carsam", "segment-anything", "mask-generation", "quantized")
# The cards of Meta's models state this licence.
PUBLISHED = (
    *(f"facebook/sam-vit-{size}" for size in ("base", "large", "huge")),
    *(f"facebook/{sam}-hiera-{size}" for sam in ("sam2", "sam2.1") for size in ("tiny", "small", "base-plus", "large")),
)
LICENCES = dict.fromkeys(PUBLISHED, "apache-2.0")
METRICS = {"segm_ap": "segm AP", "box_ap": "box AP", "mean_iou": "mean IoU"}
_MOST_CARD = 2**20
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    results: Mapping[str, Any],
    weights_bytes: int,
    licence: str | None = None,
) -> str:
    """The text of a model card. It is the same wherever the folder lies: it calls the model by base and bits.

    Args:
        config: ``config.json``.
        recipe: ``recipe.yaml``; without paths of this machine.
        results: ``results.json``; empty where nothing was measured.
        weights_bytes: Size of the weights file.
        licence: Of the base model; None where it is not known (see :func:`base_licence`).
    """
    from huggingface_hub import ModelCardData

    base, packing = str(recipe.get("model") or ""), config["quantization_config"]
    name = f"{PurePosixPath(base).stem or 'sam'}-{packing['bits']}"
    names = names_of_type(config.get("model_type"))
    data = ModelCardData(
        # The Hub takes ids only, and refuses a card with a folder's name here.
        base_model=base if _is_id(base) else None,
        library_name=names.library,
        license=licence,
        pipeline_tag="mask-generation",
        tags=list(TAGS),
        # The Hub's relation between a model and its base, for which ModelCardData has no parameter of its own.
        base_model_relation="quantized" if _is_id(base) else None,
        **_evaluation_data(name, results),
    )
    facts = {
        "base model": _base(base),
        "licence": f"{licence}, the base model's" if licence else "see the base model",
        "method": packing["method"],
        "bits": stated_bits(f"{packing['bits']} (weights, activations)", recipe),
        "weights file": f"{weights_bytes / 1e6:.1f} MB",
        "packed by": f"carsam {packing['carsam_version']}",
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    note = _STAND_IN if is_stand_in(config, base) else ""
    body = _BODY.format(
        title=_cell(name),
        note=note,
        table=table,
        scores=scores_part(results),
        quoted=name.replace('"', ""),
        transformers=_with_transformers(names, name.replace('"', "")),
        shell=shlex.quote(name),
        command=command(recipe, packing, name),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def is_model_card(path: Path) -> bool:
    """Whether a file is a model card that carsam wrote."""
    try:
        return path.is_file() and BEGIN in read_text(path, _MOST_CARD, "write it again")
    except CarsamError:
        return False


def update_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes the scores of ``results.json`` into a folder's model card; a card of the user's own stays as it is.

    Raises:
        CarsamError: The card cannot be written.
    """
    path = folder / CARD
    try:
        text = read_text(path, _MOST_CARD, "write it again")
    except CarsamError:
        return  # no card, or one that carsam did not write
    updated = with_scores(text, portable(results))
    if updated != text:
        write_text(path, updated)


def with_scores(text: str, results: Mapping[str, Any]) -> str:
    """A card with the scores of other results; as it is where it has no place for them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return text
    body = f"{before}{scores_part(results)}{after}"
    return _with_data(body, lambda card: card.data.__dict__.update(_evaluation_data(_name(card), results)))


def with_id(text: str, hub_id: str) -> str:
    """A card whose examples open the model by its Hub id."""
    text = re.sub(r'(carsam\.load\(|\b\w+\.from_pretrained\()"[^"\n]*"', rf'\g<1>"{hub_id}"', text)
    return re.sub(r"(carsam predict )\S+( photo\.jpg)", rf"\g<1>{hub_id}\g<2>", text)


def with_tags(text: str, tags: Sequence[str]) -> str:
    """A card with further tags."""
    return _with_data(text, lambda card: setattr(card.data, "tags", list(dict.fromkeys([*card.data.tags, *tags]))))


def _with_data(text: str, change: Any) -> str:
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except ValueError:
        return text  # metadata that the user broke: the body is enough
    change(card)
    return str(card)


def _name(card: Any) -> str:
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    return card.data.model_name or (title[1] if title else "model")


def scores_part(results: Mapping[str, Any]) -> str:
    """The scores with what they were measured on, between their marks."""
    rows = []
    for part, which in (("evaluation", "this model"), ("float_evaluation", "float")):
        scores = results.get(part)
        if isinstance(scores, Mapping) and any(_number(scores.get(key)) for key in METRICS):
            values = [_number(scores.get(key)) or "-" for key in METRICS]
            rows.append(f"| {which} | {' | '.join(values)} | {_measured_on(scores)} |")
    if not rows:
        return f"{BEGIN}\nNot measured yet. `carsam evaluate` measures it and writes the scores here.\n{END}"
    head = f"| model | {' | '.join(METRICS.values())} | measured on |\n| --- | {'--: | ' * len(METRICS)}--- |\n"
    return f"{BEGIN}\n{head}" + "\n".join(rows) + f"\n{END}"


def _measured_on(scores: Mapping[str, Any]) -> str:
    boxes = "detections as boxes" if scores.get("boxes") or scores.get("detections") else "ground-truth boxes"
    limit = f", the first {scores['limit']} images" if scores.get("limit") else ""
    counts = ", ".join(
        f"{scores[key]} {what}" for key, what in (("n_images", "images"), ("n_prompts", "boxes")) if key in scores
    )
    return _cell(f"{scores.get('coco', 'unknown data')}{limit}: {counts or 'all images'} ({boxes})")


def _evaluation_data(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """``eval_results`` and ``model_name`` for the card's metadata."""
    from huggingface_hub import EvalResult

    scores = results.get("evaluation")
    if not isinstance(scores, Mapping):
        return {}
    data = str(scores.get("coco") or "COCO instances")
    found = [
        EvalResult(
            task_type="mask-generation",
            dataset_type="coco",
            dataset_name=data,
            metric_type=key,
            metric_name=title,
            metric_value=round(float(scores[key]), 2),
        )
        for key, title in METRICS.items()
        if _number(scores.get(key))
    ]
    return {"eval_results": found, "model_name": name} if found else {}


def command(recipe: Mapping[str, Any], packing: Mapping[str, Any], out: str) -> str:
    """The command that makes the model again from the folder's ``recipe.yaml``."""
    calibration = recipe.get("calibration")
    calibration = calibration if isinstance(calibration, Mapping) else {}
    words = ["carsam", "quantize", str(recipe.get("model") or "FLOAT_MODEL"), "--recipe", "recipe.yaml"]
    words += ["--method", packing["method"], "--bits", packing["bits"]]
    words += ["--data", str(calibration.get("images") or "IMAGES")]
    if calibration.get("coco"):
        words += ["--data-coco", str(calibration["coco"])]
    words += ["--out", out]
    return " ".join(shlex.quote(" ".join(word.split())) for word in words)


def base_licence(source: str) -> str | None:
    """The licence that the base model's own card states, where that card is at hand.

    Args:
        source: Folder of the base model, or its Hub id; of the Hub only the cache is asked. Empty: a model in memory.
    """
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if not source:  # a model in memory: without a name, the current folder's README would be taken for its card
        return None
    path = Path(os.path.expanduser(source)) / CARD
    try:
        if not path.is_file() and _is_id(source):
            path = Path(hf_hub_download(source, CARD, local_files_only=True))
        text = read_text(path, _MOST_CARD, "write it again")
        if not text.startswith("---"):  # without metadata, which ModelCard warns of
            return LICENCES.get(source)
        data = ModelCard(text, ignore_metadata_errors=True).data
    except (EntryNotFoundError, OSError, ValueError):
        return LICENCES.get(source)
    licence = data.license_name or data.license if data.license == "other" else data.license
    return licence if isinstance(licence, str) and len(licence) < 80 else LICENCES.get(source)


def _is_id(text: str) -> bool:
    """Whether a name is a Hub id, and no folder's."""
    return _ID.fullmatch(text) is not None and not Path(text).exists()


def _base(base: str) -> str:
    return f"[{base}]({HUB_URL}{base})" if _is_id(base) else base or "not known"


def _with_transformers(names: Names, name: str) -> str:
    """How transformers opens the model: by its own class, or by another package's, which it then knows."""
    if names.library == "transformers":
        return f'After `import carsam`, transformers\' `{names.model_class}.from_pretrained("{name}")` works too.'
    text = f'After `import carsam`, transformers\' `AutoModel.from_pretrained("{name}")` works too: it gives a '
    return f"{text}`{names.model_class}`,\na class of {names.library} that transformers itself does not have."


def _number(value: Any) -> str:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:.1f}" if plain and math.isfinite(value) and abs(value) < 1e6 else ""


def _cell(text: object) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())[:500]


_STAND_IN = """
> **A stand-in.** The base model is the small SAM that carsam carries, trained from scratch because Meta's weights
> could not be downloaded where carsam is developed. Use its scores only to compare methods; they say nothing about SAM.
"""

_BODY = """# {title}

A Segment Anything model (SAM) in few bits: carsam quantized its weights and activations after training, without
retraining.
{note}
| | |
| --- | --- |
{table}

## Scores

{scores}

AP and mean IoU of the masks that the model gives for box prompts, in percent.

## Use it

```
pip install carsam
carsam predict {shell} photo.jpg --box 75,275,1725,850
```

```python
import carsam

predictor = carsam.SamPredictor(carsam.load("{quoted}"))     # segment-anything's signatures
predictor.set_image(image)                                  # (H, W, 3) uint8
masks, scores, low_res = predictor.predict(box=box)
```

{transformers} Without the import it stops with
an error that says so. The file is small; inference computes in floating point on its integers and is not faster.

## How it was made

```
{command}
```

`recipe.yaml` holds every setting. It names the calibration images; it does not contain them.
"""
