"""A data summary with thumbnails and short sounds as one self-contained HTML page."""

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from fedhead.data.items import Clip, Item, TableRow
from fedhead.data.summary import Summary
from fedhead.wording import without_controls

SIDE = 112
"""Length of a thumbnail's longer side in pixels."""

LETTERS = 240
"""Number of characters shown of a text."""

SECONDS = 5
"""Duration of an audible example."""

PREVIEW_RATE = 16_000
"""Highest sampling rate of an audible example in Hz."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4a7; height: .7rem; min-width: 1px; border-radius: 2px }
.caution { border-left: 4px solid #d80; background: var(--soft); padding: .3rem .8rem; margin: .3rem 0 }
.thumbs { display: flex; flex-wrap: wrap; gap: .4rem } figure { margin: 0 }
audio { width: 15rem; height: 2rem }
img { max-width: 7rem; max-height: 7rem; border: 1px solid var(--line); image-rendering: auto }
blockquote { margin: .3rem 0; padding: .2rem .8rem; border-left: 3px solid var(--line); overflow-wrap: anywhere }
.broken td { overflow-wrap: anywhere; border-top: 1px solid var(--line) }
"""


def example(item: Item) -> str:
    """Return the HTML of a thumbnail, or of the beginning of a text or a clip."""
    if isinstance(item, str):
        shown = item if len(item) <= LETTERS else item[:LETTERS] + "…"
        return f"<blockquote>{escape(shown)}</blockquote>"
    if isinstance(item, TableRow):
        shown = ", ".join(f"{name} {value:g}" for name, value in zip(item.columns.names, item.values, strict=True))
        return f"<blockquote>{escape(shown[:LETTERS])}</blockquote>"
    if isinstance(item, Clip):
        encoded = base64.b64encode(_wave(item)).decode()
        return f'<audio controls preload="none" src="data:audio/wav;base64,{encoded}"></audio> {item.seconds:.2g} s'
    small = item.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    # JPEG is smaller for photographs; PNG preserves the pixels of small images.
    photograph = max(item.size) >= SIDE
    small.save(content, "jpeg" if photograph else "png", **({"quality": 80} if photograph else {}))
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/{"jpeg" if photograph else "png"};base64,{encoded}" alt="">'


def _wave(clip: Clip) -> bytes:
    """Return the beginning of a clip as a WAV file of 16 bits; every browser plays these."""
    step = -(-clip.rate // PREVIEW_RATE)
    samples = clip.samples[: SECONDS * clip.rate].astype(np.float64)
    if step > 1:
        from scipy.signal import resample_poly

        samples = resample_poly(samples, 1, step)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(clip.rate // step)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()


def page(summary: Summary, facts: Sequence[tuple[str, str]], shown: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return a complete HTML page.

    Args:
        summary: the summary of the data.
        facts: names and values.
        shown: for each class, the names of some rows with their `example`.
    """
    most = max([1, *summary.classes.values()])
    cautions = "".join(f'<p class="caution">{escape(one)}</p>' for one in summary.cautions())
    left_out = "".join(f'<p class="caution">Left out: {escape(one)}</p>' for one in summary.left_out)
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    classes = "".join(
        f"<tr><td>{escape(name)}</td><td class=n>{rows}</td>"
        f'<td style="width: 24rem"><div class=bar style="width: {100 * rows / most:.1f}%"></div></td></tr>'
        for name, rows in summary.classes.items()
    )
    pictures = "".join(
        f"<h2>{escape(name)}</h2><div class={'thumbs' if summary.kind in ('image', 'audio') else 'texts'}>"
        + "".join(f'<figure title="{escape(row)}">{content}</figure>' for row, content in rows)
        + "</div>"
        for name, rows in shown.items()
        if rows
    )
    broken = "".join(
        f"<tr><td class=n>{one.row}</td><td>{escape(one.name)}</td><td>{escape(one.reason)}</td></tr>"
        for one in summary.broken
    )
    return without_controls(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(summary.spec)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(summary.spec)}</h1>{cautions}{left_out}<table>{table}</table>"
        + (f"<h2>Classes</h2><table>{classes}</table>" if summary.classes else "")
        + pictures
        + (f'<h2>Unreadable rows</h2><table class="broken">{broken}</table>' if broken else "")
        + "</body></html>\n"
    )
