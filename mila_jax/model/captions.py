"""Open-Sora's cleaning of captions before T5, twice over each.

Open-Sora 1.2 cleans every prompt that it samples from (scripts/inference.py and gradio/app.py call `text_preprocessing`, always on). Its text encoder
itself does not: `T5Embedder.use_text_preprocessing` is kept and never read, and training takes captions as its tables have them, which
tools/datasets/datautil.py --clean-caption is there to clean when they are written. Source of the rules: opensora/models/text_encoder/t5.py
(`clean_caption`, `basic_clean`), which has them from PixArt-alpha; diffusers has them, too (Apache-2.0, pipelines/deepfloyd_if).
"""

import html
import re
import urllib.parse
import warnings

from mila_jax.errors import UserError

_DOMAIN = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
# (what, by what), one after the other; the order matters.
_WITH_TAGS = (
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})", ""),
)
_MARKS = (
    (r"@\w+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes … unified ideographs
    ("[\\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),  # dashes
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # the two characters
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\][}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_WORDS = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # letters and digits as in article numbers
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # sizes; the second one is the Cyrillic letter
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _replaced(text: str, rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def check_libraries() -> None:
    """Raises `UserError` with the install line unless ftfy and beautifulsoup4 are installed."""
    try:
        import bs4  # noqa: F401
        import ftfy  # noqa: F401
    except ImportError as error:
        remedy = "pip install 'mila_jax[t5]', or take texts as they are with text.encoder=t5-raw"
        raise UserError(f"{error.name} is not installed, which cleans captions for T5; {remedy}") from None


def _clean_once(text: str) -> str:
    import bs4
    import ftfy

    text = _replaced(urllib.parse.unquote_plus(text).strip().lower(), _WITH_TAGS)
    with warnings.catch_warnings():  # it warns of texts that look like an address or a file's name
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        text = bs4.BeautifulSoup(text, features="html.parser").text
    text = _replaced(text, _MARKS)
    if len(re.findall("[-_]", text)) > 3:  # this-is-how-some-write
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _replaced(text, _WORDS).strip()


def clean_caption(text: str) -> str:
    """The caption as Open-Sora 1.2 gives it to T5: in small letters, without addresses, markup, unusual punctuation, numbers of articles and sizes.

    Raises `UserError` with the install line if ftfy or beautifulsoup4 is missing.
    """
    check_libraries()
    return _clean_once(_clean_once(text))
