"""Fetches a source package and unpacks it: pip itself would build it, or what it is built with, first.

Usage: fetch_source.py NAME VERSION FOLDER; the index is pip's own.
"""

import html
import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path


def index():
    given = os.environ.get("PIP_INDEX_URL")
    if given:
        return given
    told = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"],
                          capture_output=True, text=True)
    return told.stdout.strip() or "https://pypi.org/simple"


def main():
    name, version, folder = sys.argv[1:]
    page = f"{index().rstrip('/')}/{name}/"
    with urllib.request.urlopen(page, timeout=60) as answer:
        links = re.findall(r'href="([^"]+)"', answer.read().decode())
    file = f"{name.replace('-', '_')}-{version}.tar.gz"
    wanted = [link for link in links if urllib.parse.urlparse(link).path.endswith("/" + file)]
    if not wanted:
        raise SystemExit(f"{page} has no {file}")
    archive = Path(folder + ".part")
    urllib.request.urlretrieve(urllib.parse.urljoin(page, html.unescape(wanted[0])), archive)
    with tarfile.open(archive) as source:
        source.extractall(folder + ".new", filter="data")
    archive.unlink()
    os.rename(folder + ".new", folder)


if __name__ == "__main__":
    main()
