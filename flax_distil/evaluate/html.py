"""report.html: one file that needs no network, readable in light and dark and on a phone."""

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from flax_distil.audio import SAMPLE_RATE
from flax_distil.evaluate.plots import figures, to_svg
from flax_distil.evaluate.report import Report, WorstClip
from flax_distil.evaluate.tables import Cell, ReportTable
from flax_distil.text.wer import error_rate


def to_html(report: Report) -> str:
    """The page. Without matplotlib it has no figures."""
    template = Template(files("flax_distil.evaluate").joinpath("report.html").read_text("utf-8"))
    sections = [section(one.name, one.title, table_html(one)) for one in report.tables]
    sections[1:1] = list(figure_sections(report))
    if report.worst:
        clips = clips_html(report.worst)
        note = "<p class=note>Words that differ from the reference are marked.</p>"
        title = "Clips on which the models differ most"
        sections.append(section("clips", title, note + clips))
    if report.skipped:
        lists = [
            f"<details><summary>{escape(name)}: {len(reasons)}</summary><ul>"
            + "".join(f"<li>{escape(one)}</li>" for one in reasons)
            + "</ul></details>"
            for name, reasons in report.skipped.items()
        ]
        sections.append(section("skipped", "Skipped clips", "".join(lists)))
    pairs = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in report.settings.items()
    )
    recipe = f"<details><summary>Recipe</summary><pre>{escape(report.recipe)}</pre></details>"
    settings = f"<dl>{pairs}</dl>{recipe if report.recipe else ''}"
    sections.append(section("settings", "Settings", settings))
    names = ", ".join(one["name"] for one in report.models)
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    return template.substitute(
        title=escape(names),
        links=links,
        sections="\n".join(
            f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'
            for name, title, body in sections
        ),
    )


def section(name: str, title: str, body: str) -> tuple[str, str, str]:
    """A section's id, heading and HTML."""
    return name, title, body


def figure_sections(report: Report) -> Iterator[tuple[str, str, str]]:
    """A section with the figures, if matplotlib is installed."""
    try:
        drawn = [
            f"<figure>{to_svg(one)}<figcaption>{escape(title)}</figcaption></figure>"
            for title, one in figures(report)
        ]
    except ImportError:
        drawn = ["<p>Figures need matplotlib: pip install matplotlib.</p>"]
    if drawn:
        yield section("figures", "Figures", f"<div class=figures>{''.join(drawn)}</div>")


def table_html(table: ReportTable) -> str:
    """A table whose columns can be sorted."""
    heads = "".join(
        f"<th scope=col aria-sort=none class={'n' if column.format else 't'}>"
        f"<button type=button>{escape(column.title)}</button></th>"
        for column in table.columns
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td class={'n' if column.format else 't'} "
            f'data-v="{escape(str(sort_value(row[column.title])))}">'
            f"{escape(column.text(row[column.title]))}</td>"
            for column in table.columns
        )
        + "</tr>"
        for row in table.rows
    )
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<div class=scroll><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def sort_value(cell: Cell) -> Any:
    """What a cell is sorted by."""
    if isinstance(cell, tuple):
        return cell[0]
    return "" if cell is None else cell


def clips_html(clips: Sequence[WorstClip]) -> str:
    """Clips one below the other."""
    return "\n".join(clip_html(one, number) for number, one in enumerate(clips))


def clip_html(clip: WorstClip, number: int) -> str:
    """A clip: audio, reference, and every model's text with its differences."""
    first = next(iter(clip.results.values()))
    player = ""
    if clip.waveform is not None:
        data = base64.b64encode(encode_mp3(clip.waveform)).decode()
        player = (
            f'<audio controls preload=metadata aria-label="{escape(first.id)}" '
            f'src="data:audio/mpeg;base64,{data}"></audio>'
        )
    lines = "".join(
        f"<dt>{escape(model)} <small>{clip.rates[model]:.0f} %</small></dt>"
        f"<dd>{difference_html(result.reference, result.text, result.language)}</dd>"
        for model, result in clip.results.items()
    )
    return (
        f'<article class=clip id="clip-{number}"><h3>{escape(first.dataset)} · '
        f"{escape(first.id)}</h3>{player}<dl><dt>reference</dt>"
        f"<dd>{escape(first.reference)}</dd>{lines}</dl></article>"
    )


def difference_html(reference: str, text: str, language: str) -> str:
    """The normalised text, word by word: inserted words, substituted and deleted ones are marked
    with what the reference has."""
    from jiwer import process_words

    normalize = error_rate(language, "wer").normalize
    wanted, given = normalize(reference), normalize(text)
    if not wanted or not given:
        return f"<ins>{escape(given)}</ins>" if given else f"<del>{escape(wanted)}</del>"
    output, parts = process_words([wanted], [given]), list[str]()
    ours, theirs = output.hypotheses[0], output.references[0]
    for chunk in output.alignments[0]:
        words = escape(" ".join(ours[chunk.hyp_start_idx : chunk.hyp_end_idx]))
        missing = escape(" ".join(theirs[chunk.ref_start_idx : chunk.ref_end_idx]))
        if chunk.type == "equal":
            parts.append(words)
            continue
        parts += [f"<del>{missing}</del>"] if missing else []
        parts += [f"<ins>{words}</ins>"] if words else []
    return " ".join(parts)


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
