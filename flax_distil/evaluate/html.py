"""report.html: one file that needs no network, readable in light and dark and on a phone."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from flax_distil.audio import SAMPLE_RATE
from flax_distil.evaluate.differences import AlignedWord, align_words
from flax_distil.evaluate.plots import figures, to_svg
from flax_distil.evaluate.report import Report, WorstClip
from flax_distil.evaluate.tables import Cell, Column, ReportTable

# Aligned words; the report has it with its clips, and so has a notebook.
STYLE = """<style>
.aligned { display: flex; flex-wrap: wrap; row-gap: .9rem; line-height: 1.7 }
.aligned > div { display: flex; flex-direction: column; min-width: 0 }
.aligned > div > * { padding: 0 .22rem; min-height: 1.7em; overflow-wrap: anywhere }
.aligned > div > :first-child { color: var(--dim, gray); border-bottom: 1px solid #8884 }
.aligned .names > * { width: clamp(5.4rem, 12vw, 9.5rem); padding: 0 .7rem 0 0; font-size: .85rem;
  line-height: 2; color: var(--dim, gray); overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis }
.aligned hr { flex-basis: 100%; height: 0; margin: 0; border: 0 }
mark, ins, del { color: inherit; border-radius: .25rem; padding: 0 .22rem; width: fit-content }
mark { background: #e6a80050; font-weight: 600; text-decoration: underline dotted }
del { background: #dc3c3240 }
ins { background: #28a05040; text-decoration: none } ins::before { content: "+" }
</style>"""
KINDS = {"equal": "span", "substitute": "mark", "delete": "del", "insert": "ins"}


def to_html(report: Report) -> str:
    """The page."""
    template = Template(files("flax_distil.evaluate").joinpath("report.html").read_text("utf-8"))
    sections = list(report_sections(report))
    title = report.title or " · ".join(one["name"] for one in report.models)
    return template.substitute(
        title=escape(title),
        about=about(report) if report.models else "",
        models="" if report.title else "".join(map(model_html, report.models)),
        links="".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections),
        sections="\n".join(
            f'<section id="{name}"><h2>{title}</h2>{body}</section>'
            for name, title, body in sections
        ),
    )


def report_sections(report: Report) -> Iterator[tuple[str, str, str]]:
    """Id, heading and content of each section."""
    first, *rest = [(one.name, escape(one.title), table_html(one)) for one in report.tables]
    yield first
    drawn = [
        f"<figure{' class=wide' if one.get_figwidth() > 7 else ''}>"
        f"<figcaption>{escape(title)}</figcaption>{to_svg(one)}</figure>"
        for title, one in figures(report)
    ]
    if drawn:
        yield "figures", "Figures", f"<div class=figures>{''.join(drawn)}</div>"
    yield from rest
    if report.worst:
        yield "clips", "Clips that differ most", clips_html(report.worst)
    if report.skipped:
        lists = [
            f"<details><summary>{escape(name)}: {len(reasons)}</summary><ul>"
            + "".join(f"<li>{escape(one)}</li>" for one in reasons)
            + "</ul></details>"
            for name, reasons in report.skipped.items()
        ]
        yield "skipped", "Skipped clips", "".join(lists)
    pairs = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in report.settings.items()
    )
    recipe = f"<details><summary>Recipe</summary><pre>{escape(report.recipe)}</pre></details>"
    yield "settings", "Settings", f"<dl>{pairs}</dl>{recipe if report.recipe else ''}"


def about(report: Report) -> str:
    """Datasets, clips and device in one line."""
    sets = report.models[0]["datasets"]
    minutes = sum(one["audio_seconds"] for one in sets) / 60
    parts = [f"{len(sets)} datasets" if len(sets) > 1 else "".join(one["name"] for one in sets)]
    parts += [f"{sum(one['clips'] for one in sets):,} clips", f"{minutes:,.1f} minutes"]
    parts = [*parts, str(report.settings["device"]), str(report.settings["precision"])]
    return escape(" · ".join(filter(None, parts)))


def model_html(model: Mapping[str, Any]) -> str:
    """The most important figures of a model."""
    column = Column("")
    unit = "/".join(dict.fromkeys(one["rate"] for one in model["datasets"]))
    rate, apart = model["interval"] or {}, model["difference"] or {}
    lines = [f"{rate['low']:.1f} to {rate['high']:.1f}" if rate.get("low") is not None else ""]
    if apart.get("value"):
        lines.append(f"{apart['value']:+.1f} points against the first model")
    speed, size = model["relative_speed"], model["parameters"] / 1e6
    lines.append(" · ".join([f"{speed:.2f}× speed"] * (speed is not None) + [f"{size:.1f} M"]))
    return (
        f"<div class=model><h3>{escape(model['name'])}</h3>"
        f"<p class=rate>{column.text(model['wer'])} <small>% {unit}</small></p>"
        + "".join(f"<p>{line}</p>" for line in lines if line)
        + "</div>"
    )


def table_html(table: ReportTable) -> str:
    """A table whose columns can be sorted."""
    heads = "".join(
        f"<th scope=col aria-sort=none class={'n' if column.format else 't'}>"
        f"<button type=button>{escape(column.title)}</button></th>"
        for column in table.columns
    )
    rows = "".join(
        "<tr>" + "".join(cell_html(one, row[one.title]) for one in table.columns) + "</tr>"
        for row in table.rows
    )
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<div class=scroll><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def cell_html(column: Column, cell: Cell) -> str:
    """A cell with its interval, and the value it is sorted by."""
    value = cell[0] if isinstance(cell, tuple) else "" if cell is None else cell
    interval = column.interval(cell)
    return (
        f'<td class={"n" if column.format else "t"} data-v="{escape(str(value))}">'
        f"{escape(column.value(cell))}{f' <small>{interval}</small>' if interval else ''}</td>"
    )


def clips_html(clips: Sequence[WorstClip]) -> str:
    """Clips one below the other."""
    return (
        STYLE
        + "<p class=note>Words under the reference's: <mark>substituted</mark>, "
        + "<del>deleted</del>, <ins>inserted</ins>.</p>"
        + "\n".join(clip_html(one, number) for number, one in enumerate(clips))
    )


def clip_html(clip: WorstClip, number: int) -> str:
    """A clip: audio, and the models' words aligned with those of the reference."""
    first, player = next(iter(clip.results.values())), ""
    if clip.waveform is not None:
        data = base64.b64encode(encode_mp3(clip.waveform)).decode()
        player = (
            f'<audio controls preload=metadata aria-label="{escape(first.id)}" '
            f'src="data:audio/mpeg;base64,{data}"></audio>'
        )
    names = "".join(f'<span title="{escape(one)}">{escape(one)}</span>' for one in clip.results)
    rates = " · ".join(f"{escape(name)} {rate:.0f} %" for name, rate in clip.rates.items())
    texts = [one.text for one in clip.results.values()]
    words = "".join(
        f"<div><span>{escape(column.reference)}</span>{''.join(map(word_html, column.words))}</div>"
        for column in align_words(first.reference, texts, first.language)
    )
    return (
        f'<article class=clip id="clip-{number}">'
        f'<h3 title="{escape(first.id)}">{escape(Path(first.id).name)}</h3>'
        f"<small>{escape(first.dataset)} · {first.seconds:.1f} s · error rate: {rates}</small>"
        f"{player}"
        f"<div class=aligned><div class=names><span>reference</span>{names}</div>{words}</div>"
        "</article>"
    )


def word_html(word: AlignedWord | None) -> str:
    """A word, marked by its kind."""
    if word is None:
        return "<span></span>"
    return f"<{KINDS[word.kind]}>{escape(word.text)}</{KINDS[word.kind]}>"


def encode_mp3(waveform: Sequence[float] | np.ndarray) -> bytes:
    """A 16 kHz waveform as MP3, which every browser plays."""
    import av

    contents = io.BytesIO()
    with av.open(contents, "w", format="mp3") as container:
        stream = container.add_stream("mp3", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = 48_000
        peak = max(1.0, float(np.abs(waveform).max(initial=0)))
        samples = np.asarray(waveform, np.float32)[None] / peak
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return contents.getvalue()
