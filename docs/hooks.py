"""What the site takes from outside of docs/: the README as its front page, and the pictures of benchmarks/results.

Pages link to both as on a repository page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
MAP = "## Where to look"  # of index.md this part stands on the site, below the README


def on_files(files: Files, config: Any) -> Files:
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def front_page(readme: str, index: str) -> str:
    """The README and the map of index.md; links into docs/ as from index.md, other files of the repository as code."""
    readme = re.sub(r"\]\(docs/(?!index\.md)", "](", readme)
    readme = readme.replace("](docs/index.md)", f"](#{MAP.lower().lstrip('# ').replace(' ', '-')})")
    readme = re.sub(r"\[[^\]]*\]\(([A-Z]+(?:\.md)?)\)", r"`\1`", readme)
    return f"{readme.rstrip()}\n\n{index[index.index(MAP) :]}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_path == "index.md":
        return front_page((ROOT / "README.md").read_text("utf-8"), markdown)
    return markdown.replace("](../benchmarks/results/", "](benchmarks/results/")


def on_serve(server: Any, **_: Any) -> Any:
    server.watch(str(ROOT / "README.md"))
    return server
