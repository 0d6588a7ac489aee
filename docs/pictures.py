"""The pictures of benchmarks/results on the site, where pages link to them as on a repository page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        path = picture.relative_to(ROOT).as_posix()
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
