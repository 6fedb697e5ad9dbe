"""The comparison job: several evaluations on one page; refuses evaluations with different settings."""

import base64
import html
import io

import numpy as np

from trm_diffusion.analysis.grids import image_grid
from trm_diffusion.errors import UserError
from trm_diffusion.files import check_writable, write_text
from trm_diffusion.metrics.image_sets import open_images
from trm_diffusion.readers.paths import any_path
from trm_diffusion.readers.records import check, read_json
from trm_diffusion.runtime.logging import say

METRICS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall"}
FIELDS = ("num_images", "fid_name", "intervals_95", "images", "protocol", "sampling")
FORM = {
    **dict.fromkeys(METRICS, float), "num_images": int, "fid_name": str, "images": str, "sampling": dict,
    "intervals_95": dict.fromkeys(METRICS, (float, float)), "protocol": {"image_size_cropped_to": int | None},
    "warnings?": [str],
}  # fmt: skip
# Fields in which compared evaluations may differ: file locations and the models themselves.
FREE_PROTOCOL = ("reference",)
SHOWN = ("latent_steps", "recursive_blocks", "update", "train_seed")
FREE_SAMPLING = (*SHOWN, "config", "weights_sha256", "version", "git_commit", "jax", "device")
GRID_IMAGES, GRID_COLUMNS, GRID_PIXELS = 32, 8, 64
STYLE = """
body { font: 15px sans-serif; margin: 2em auto; max-width: 75em }
table { border-collapse: collapse } td, th { padding: .3em .8em; border-bottom: 1px solid #ccc; text-align: left }
.interval { color: #777; font-size: 85% } .grids { display: flex; flex-wrap: wrap; gap: 1.5em }
figure { margin: 0 } img { image-rendering: pixelated; max-width: 36em }
"""


def compare(paths: list[str], out: str) -> None:
    """Writes one self-contained page: metrics with confidence intervals, the models' settings, and sample grids.

    Raises:
      UserError: fewer than two evaluations, a file that is not one, or settings that differ.
    """
    if len(paths) < 2:
        raise UserError("--evaluations needs two files or more, separated by commas")
    check_writable(out)
    reports = {path: read_evaluation(path) for path in paths}
    first = paths[0]
    for path, report in reports.items():
        here, there = conditions(reports[first]), conditions(report)
        different = [field for field in sorted(here | there) if here.get(field) != there.get(field)]
        if different:
            raise UserError(
                f"{first} and {path} were not measured alike and cannot be compared: "
                + "; ".join(f"{field} {here.get(field)!r} and {there.get(field)!r}" for field in different)
            )
    write_text(out, page(reports))
    say(f"wrote {out}")


def read_evaluation(path: str) -> dict:
    """Reads an evaluation.json of the ADM protocol. Raises UserError for any other file."""
    report = read_json(any_path(path, "--evaluations"))
    missing = [field for field in (*METRICS, *FIELDS) if field not in report]
    if missing:
        raise UserError(
            f"{path} is not an evaluation of images (no {missing[0]}); make one with --mode=evaluate --images"
        )
    check(report, FORM, path, "make an evaluation with --mode=evaluate --images")
    return report


def conditions(report: dict) -> dict:
    """Everything that the metrics depend on, except the model."""
    measuring, sampling = report["protocol"].items(), report["sampling"].items()
    return (
        {"num_images": report["num_images"]}
        | {f"protocol.{field}": value for field, value in measuring if field not in FREE_PROTOCOL}
        | {f"sampling.{field}": value for field, value in sampling if field not in FREE_SAMPLING}
    )


def page(reports: dict[str, dict]) -> str:
    """The page as HTML with embedded pictures."""
    first = next(iter(reports.values()))
    rows = "".join(_row(path, report) for path, report in reports.items())
    figures = "".join(_figure(path, report) for path, report in reports.items())
    warnings = dict.fromkeys(warning for report in reports.values() for warning in report.get("warnings", []))
    head = "".join(f"<th>{label}</th>" for label in ("", *METRICS.values(), *SHOWN))
    same = "".join(
        f"<tr><td>{html.escape(field)}</td><td>{html.escape(str(value))}</td></tr>"
        for field, value in conditions(first).items()
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>Comparison</title><style>{STYLE}</style>"
        f"<h1>{html.escape(first['fid_name'])}</h1><table><tr>{head}</tr>{rows}</table>"
        "<p class=interval>In brackets: 95% bootstrap intervals over the images, not over training seeds."
        f"</p>{''.join(f'<p>{html.escape(warning)}</p>' for warning in warnings)}"
        f"<div class=grids>{figures}</div><h2>Settings of all evaluations</h2><table>{same}</table>\n"
    )


def _row(path: str, report: dict) -> str:
    cells = [f"<td>{html.escape(path)}</td>"]
    for metric in METRICS:
        low, high = report["intervals_95"][metric]
        cells.append(f"<td>{report[metric]:.4g} <span class=interval>[{low:.4g}, {high:.4g}]</span></td>")
    cells += [f"<td>{html.escape(str(report['sampling'].get(field)))}</td>" for field in SHOWN]
    return f"<tr>{''.join(cells)}</tr>"


def _figure(path: str, report: dict) -> str:
    """The first images of a set, as a picture embedded in the page."""
    from PIL import Image

    images = open_images(report["images"], report["protocol"]["image_size_cropped_to"] or 0)
    pixels = next(images.batches(GRID_IMAGES))
    scale = max(1, GRID_PIXELS // pixels.shape[2])
    grid = image_grid((pixels.astype(np.float32) - 127.5) / 127.5, GRID_COLUMNS, scale=scale)
    stream = io.BytesIO()
    Image.fromarray(grid).save(stream, format="PNG")
    source = base64.b64encode(stream.getvalue()).decode()
    return f"<figure><img src='data:image/png;base64,{source}'><figcaption>{html.escape(path)}</figcaption></figure>"
