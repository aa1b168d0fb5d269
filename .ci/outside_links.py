"""A hook of mkdocs: links that leave docs/ become the path of the file, since the site has no other
files of the repository. ``.ci/check_links.py`` has checked that they lead somewhere."""

from __future__ import annotations

import posixpath
import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def path_of(match: re.Match[str]) -> str:
        text, target = match[1], posixpath.normpath(posixpath.join(folder, match[2]))
        name = posixpath.basename(target)
        return f"`{target}`" if name in text else f"{text} (`{target}`)"

    return OUTSIDE.sub(path_of, markdown)
