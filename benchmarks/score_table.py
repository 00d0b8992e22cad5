"""The table of several models' scores, from what ``carsam evaluate MODEL ... --json FILE`` wrote of each.

    python benchmarks/score_table.py float=float.json QDrop=qdrop.json RTN=rtn.json --baseline QDrop
    python benchmarks/score_table.py float=float.json QDrop=qdrop-0.json,qdrop-1.json RTN=rtn.json

Files that commas join are seeds of one row: what stands there is their mean, with the standard deviation.
The files are of images (segm AP, box AP, mean IoU) or of videos (J&F, J, F), all on the same data. Differences of mean
IoU, or of J&F, are paired, with 95 % intervals over images or videos. DAVIS has few videos: an interval over ten says
little about others.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import options

from carsam.errors import DataError
from carsam.evaluate.intervals import difference_interval
from carsam.reading import read_json

IMAGES = {"segm AP": "segm_ap", "box AP": "box_ap", "mean IoU": "mean_iou"}
VIDEOS = {"J&F": "j_and_f", "J": "j_mean", "F": "f_mean", "J decay": "j_decay"}
# What tells two measurements apart that cannot be compared.
DATA = ("prompt", "n_videos", "n_images", "n_objects", "n_prompts", "n_frames")


def scores(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores in percent by image or video, as intervals take them; each the mean over the seeds."""
    seeds = [{each["name"]: each["ious"] for each in _scores(result)} for result in results]
    return [
        {"name": name, "ious": [statistics.fmean(values) for values in zip(*(seed[name] for seed in seeds))]}
        for name in seeds[0]
    ]


def _scores(result: dict[str, Any]) -> list[dict[str, Any]]:
    if "per_image" in result:
        return result["per_image"]
    found: dict[str, list[float]] = {}
    for each in result["objects"]:
        found.setdefault(each["video"], []).append(100 * each["j_and_f"])
    return [{"name": name, "ious": values} for name, values in found.items()]


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("rows", nargs="+", metavar="TITLE=FILE", help="results; the first one is the float model's")
    parser.add_argument("--baseline", help="title of a row that the others are compared with as well")
    arguments = options.parse(parser)
    results = {}
    for row in arguments.rows:
        title, _, paths = row.partition("=")
        results[title] = [read_json(Path(path), "evaluate the model again with --json") for path in paths.split(",")]
    if len({tuple(result.get(key) for key in DATA) for seeds in results.values() for result in seeds}) > 1:
        raise DataError("the results are not of the same images, or videos and frames; evaluate them again.")
    against = [next(iter(results)), *([arguments.baseline] if arguments.baseline else [])]
    measures = VIDEOS if "j_and_f" in results[against[0]][0] else IMAGES
    options.head("row", "seeds", *measures, *(f"to {title} (95 %)" for title in against))
    for title, result in results.items():
        cells = [str(len(result)), *(_mean([seed[key] for seed in result]) for key in measures.values())]
        for other in against:
            own = title in (other, against[0])
            cells.append("" if own else str(difference_interval(scores(result), scores(results[other])) or ""))
        options.row(title, *cells)


if __name__ == "__main__":
    main()
