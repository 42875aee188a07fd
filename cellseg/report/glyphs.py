"""Which characters can be drawn with the fonts at hand: asked of typst, never guessed."""

import json
from collections.abc import Iterator
from typing import Any

import typst

# Typst brings this one (Latin, Greek, Cyrillic), so the report looks the same everywhere.
_TEXT_FONT = "Libertinus Serif"
# Chinese fonts of Linux, macOS and Windows, the ones made for body text first; only for
# characters that the text font lacks.
_CJK_FONTS = (
    "Noto Serif CJK TC",
    "Noto Serif TC",
    "Source Han Serif TC",
    "Songti TC",
    "PMingLiU",
    "Noto Serif CJK SC",
    "Noto Serif SC",
    "Source Han Serif SC",
    "Songti SC",
    "SimSun",
    "Noto Serif CJK JP",
    "Noto Sans CJK TC",
    "Noto Sans TC",
    "Source Han Sans TC",
    "PingFang TC",
    "Heiti TC",
    "Microsoft JhengHei",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK JP",
    "Hiragino Sans",
    "Yu Gothic",
    "AR PL UMing TW",
    "WenQuanYi Zen Hei",
)
_PROBE = "#set text(font: json(bytes(sys.inputs.fonts)))\n#json(bytes(sys.inputs.text))"


def pick_fonts(fonts: typst.Fonts) -> list[str]:
    """Return the families to set text in, the first that has a character wins."""
    installed = set(fonts.families())
    return [_TEXT_FONT, *(family for family in _CJK_FONTS if family in installed)]


def drop_undrawable(facts: Any, fonts: typst.Fonts) -> tuple[Any, list[str]]:
    """Leave out the characters that no font at hand can draw, where a box would stand.

    Args:
        facts: nested lists and dicts with texts as values.
        fonts: the fonts that the report will be set in.

    Returns:
        facts: the same without those characters (an empty text where nothing remains).
        warnings: one sentence that names them and the remedy, if there are any.
    """
    texts = list(_texts(facts))
    foreign = sorted({char for text in texts for char in text if not _is_plain(char)})
    families = pick_fonts(fonts)
    if _can_draw("".join(foreign), families, fonts):
        return facts, []
    missing = {char for char in foreign if not _can_draw(char, families, fonts)}
    hit = next(text for text in texts if missing & set(text))
    warning = (
        f"no installed font can draw {''.join(sorted(missing))!r} (in {hit!r}), so they are "
        "left out of the report; install a font that has them, for Chinese, Japanese and "
        "Korean for example the package fonts-noto-cjk, and build the report again"
    )
    return _without(facts, missing), [warning]


def _is_plain(char: str) -> bool:
    """Tell whether a character is printable ASCII, which every font has."""
    return " " <= char <= "~"


def _can_draw(text: str, families: list[str], fonts: typst.Fonts) -> bool:
    """Tell whether each character of a text has a glyph (PDF/A forbids one without)."""
    inputs = {"text": json.dumps(text), "fonts": json.dumps(families)}
    try:
        typst.compile(
            _PROBE.encode(), format="pdf", pdf_standards="a-2b", sys_inputs=inputs, font_paths=fonts
        )
    except typst.TypstError:
        return False
    return True


def _texts(facts: Any) -> Iterator[str]:
    """Yield every text among nested values."""
    if isinstance(facts, str):
        yield facts
    elif isinstance(facts, dict | list):
        for value in facts.values() if isinstance(facts, dict) else facts:
            yield from _texts(value)


def _without(facts: Any, missing: set[str]) -> Any:
    """Return nested values with characters taken out of every text."""
    if isinstance(facts, str):
        return "".join(char for char in facts if char not in missing).strip()
    if isinstance(facts, dict):
        return {key: _without(value, missing) for key, value in facts.items()}
    return [_without(value, missing) for value in facts] if isinstance(facts, list) else facts
