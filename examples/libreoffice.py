"""The pages of LibreOffice's help (MPL-2.0): installed, or fetched with apt, without root."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from packages import fetch_debian

HELP = Path("usr/share/libreoffice/help")  # where its packages keep their pages, below the root


def help_pages(languages: Sequence[str], scratch: Path, size: str, instead: str) -> Path:
    """The folder that has a folder for each language, "en-US" or "de"; `scratch` and the rest: of `fetch_debian`."""
    pages = Path("/") / HELP
    if not all((pages / language / "text").is_dir() for language in languages):
        fetch_debian([f"libreoffice-help-{language.lower()}" for language in languages], scratch, size, instead)
        pages = scratch / HELP
    return pages


def paragraphs(page: Path) -> dict[str, str]:
    """Paragraph id -> its HTML, without the key names that the page shows on a Mac only; headings are of them too."""
    text = re.sub(r'<span hidden="true" id="MAC.*?</span></span>', "", page.read_text(encoding="utf-8"))
    return dict(re.findall(r'<(?:p|h\d) id="([^"]+)"[^>]*>(.*?)</(?:p|h\d)>', text, re.DOTALL))
