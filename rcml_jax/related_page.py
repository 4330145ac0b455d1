"""A page of related items: one HTML file with its pictures in it, and nothing from elsewhere."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence

from PIL import Image

from rcml_jax.data.images import DECODE_ERRORS, open_rgb, storable

_SIDE = 320  # pixels of a thumbnail's longer side: sharp on a phone's dense screen
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --soft: #5d646d; --card: #f4f5f7;
  --line: #dfe2e6; --accent: #2557a7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e8eaed; --soft: #9aa2ad;
  --card: #1f2329; --line: #333941; --accent: #8ab4f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem; background: var(--paper);
  color: var(--ink); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 1rem; }
.query { display: flex; gap: 1rem; align-items: center; padding: 1rem; margin-bottom: 1.5rem;
  border: 1px solid var(--line); border-left: 4px solid var(--accent); border-radius: .75rem; }
.query .frame { flex: 0 0 7rem; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
li { background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  overflow: hidden; }
li > div:last-child { padding: .6rem .75rem .8rem; }
.frame { aspect-ratio: 1; display: grid; place-items: center; background: #fff; color: #6b7280;
  font-size: .85rem; border-radius: .5rem; overflow: hidden; }
li .frame { border-radius: 0; border-bottom: 1px solid var(--line); }
.frame img { width: 100%; height: 100%; object-fit: contain; display: block; }
p { margin: 0; }
.score, .id, footer { color: var(--soft); font-size: .85rem; }
.score { font-variant-numeric: tabular-nums; }
footer { margin-top: 1.5rem; }
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """What is shown of the query or of an item that was found; picture: the bytes of its file."""

    id: str = ""
    text: str = ""
    picture: bytes | None = None
    score: float | None = None


def page(relation: str, query: Card, found: Sequence[Card], note: str = "") -> str:
    """The page of what was found for a query under a relation, best first; note: the last line.

    All texts are escaped. A picture that cannot be decoded is shown as missing.
    """
    cards = "\n".join(
        f"<li>{_frame(card)}<div><p class=score>{number} · {card.score:.3f}</p>{_words(card)}"
        "</div></li>"
        for number, card in enumerate(found, 1)
    )
    frame = _frame(query) if query.picture is not None or query.id else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_escape(query.text or query.id)}: related items</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_escape(relation)}</h1>
<section class="query" aria-label="Query">{frame}<div>{_words(query)}</div></section>
<main><ol aria-label="Related items, the most related first">
{cards}
</ol></main>
<footer>{_escape(note)}</footer>
</body>
</html>
"""


def _words(card: Card) -> str:
    text = f"<p>{_escape(card.text)}</p>" if card.text else ""
    return text + (f"<p class=id>{_escape(card.id)}</p>" if card.id else "")


def _frame(card: Card) -> str:
    data = None if card.picture is None else _thumbnail(card.picture)
    if data is None:
        return '<div class="frame">no picture</div>'
    alt = _escape(card.text or card.id or "the query")
    return f'<div class="frame"><img src="data:image/jpeg;base64,{data}" alt="{alt}"></div>'


def _thumbnail(encoded: bytes) -> str | None:
    """A small JPEG in base64, upright, transparent parts white; None where that cannot be made."""
    try:
        picture = open_rgb(storable(encoded, _SIDE))
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    except DECODE_ERRORS:
        return None
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def _escape(text: str) -> str:
    # Half of a surrogate pair, which JSON can hold, has no UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode())
