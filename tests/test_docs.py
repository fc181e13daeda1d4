import re
from pathlib import Path

from dspark_sim.trace import SCHEMA_VERSION, SCHEMAS

DOCS = Path(__file__).parent.parent / "docs"


def test_the_format_page_lists_every_column_in_order() -> None:
    text = (DOCS / "trace-format.md").read_text(encoding="utf-8")
    assert f"schema version {SCHEMA_VERSION}" in text
    sections = dict(re.findall(r"^## (\w+):(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name, schema in SCHEMAS.items():
        assert re.findall(r"^\| `(\w+)`", sections[name], re.MULTILINE) == schema.names


def test_links_between_pages_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
