import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fedhead.cli import app


def look(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", *arguments], env={"COLUMNS": "80"})


def figures(*arguments: str) -> dict[str, Any]:
    result = look(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of sites with everything that a folder may suffer from."""
    generator = np.random.default_rng(0)
    for site in ("north", "south"):
        for kind in ("ant", "bee", "Bee"):
            (tmp_path / site / kind).mkdir(parents=True)
            for number in range(6):
                pixels = generator.integers(0, 256, (20 + number, 30, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / site / kind / f"{number}.png")
    one = tmp_path / "north" / "ant" / "0.png"
    (tmp_path / "north" / "ant" / "copy.png").write_bytes(one.read_bytes())
    (tmp_path / "south" / "bee" / "other.png").write_bytes(one.read_bytes())
    Image.open(one).convert("RGBA").save(tmp_path / "north" / "bee" / "clear.png")
    (tmp_path / "south" / "ant" / "<i>.png").write_bytes(one.read_bytes()[:70])
    return tmp_path


def test_what_is_in_a_folder_and_wrong_with_it_is_told(scans: Path) -> None:
    found = figures(f"folder:{scans}", "--by-site")
    assert (found["rows"], found["readable"], found["kind"]) == (40, 39, "image")
    assert found["classes"] == {"Bee": 12, "ant": 14, "bee": 14}
    assert found["sites"] == {"north": 20, "south": 20}
    assert found["modes"] == {"RGB": 38, "RGBA": 1}
    assert (found["width"], found["height"]["least"], found["height"]["greatest"]) == (
        {"least": 30, "median": 30, "greatest": 30},
        20,
        25,
    )
    # The opaque copy has the pixels of the others, so four rows are equal, of two classes.
    assert (found["duplicates"], found["conflicting"]) == (3, 4)
    assert found["similar_classes"] == [["Bee", "bee"]]
    assert [broken["name"].rpartition("/")[2] for broken in found["broken"]] == ["<i>.png"]
    assert len(found["cautions"]) == 3


def test_a_terminal_of_eighty_columns_is_enough(scans: Path) -> None:
    result = look(f"folder:{scans}", "--by-site")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[1:])
    text = " ".join(result.stdout.split())
    for words in ("40 images in 3 classes", "6 sizes", "RGB 38, RGBA 1", "north 20, south 20", "3 rows repeat another"):
        assert words in text
    assert "cannot be read as an image" in text
    assert "'Bee' and 'bee' differ only by case" in text


def test_the_page_holds_examples_of_every_class_and_needs_nothing_else(scans: Path) -> None:
    result = look(f"folder:{scans}", "--by-site", "--html", str(scans / "page.html"))
    assert result.exit_code == 0
    text = (scans / "page.html").read_text()
    # Eight of each class, but for the broken row, which may be among them.
    assert 23 <= text.count('<img src="data:image/png;base64,') <= 24
    assert "http" not in text
    assert "<i>.png" not in text
    assert "&lt;i&gt;.png" in text
    assert re.search(r"<h2>Unreadable rows</h2>", text)


def test_texts_have_lengths_and_splits_may_straddle(tmp_path: Path) -> None:
    rows = [
        "one,a,train,p",
        "two words,b,train,q",
        "one,a,test,r",
        "three more words,b,test,q",
        "alone,a,test,s",
        ",b,test,t",
    ]
    (tmp_path / "t.csv").write_text("text,label,split,group\n" + "\n".join(rows) + "\n")
    found = figures(f"csv:{tmp_path / 't.csv'}")
    assert (found["kind"], found["readable"], found["groups"], found["largest_group"]) == ("text", 5, 4, 2)
    assert found["words"] == {"least": 1, "median": 1, "greatest": 3}
    assert found["splits"] == {"test": 4, "train": 2}
    # Both rows of equal text, and both of the group q.
    assert (found["straddling"], found["duplicates"], found["conflicting"]) == (4, 1, 0)
    assert "line 7 has no text" in found["broken"][0]["reason"]
    page = tmp_path / "page.html"
    assert look(f"csv:{tmp_path / 't.csv'}", "--html", str(page)).exit_code == 0
    assert "<blockquote>three more words</blockquote>" in page.read_text()


def test_rows_without_labels_have_no_classes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\na\nb\n")
    spec = f"csv:{tmp_path / 't.csv'}?labels=no"
    assert (figures(spec)["classes"], figures(spec)["cautions"]) == ({}, [])
    assert "2 texts without labels" in look(spec).stdout


def test_multi_labels_are_counted_by_class(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,x;y\nb,\nc,y\n")
    found = figures(f"csv:{tmp_path / 't.csv'}?separator=;")
    assert (found["multi_label"], found["classes"], found["without_class"]) == (True, {"x": 1, "y": 2}, 1)


def test_so_many_rows_are_read_as_asked_for() -> None:
    found = figures("digits", "--rows", "50")
    assert (found["rows"], found["looked_at"], found["sizes"]) == (1797, 50, {"8 x 8": 50})


def test_nothing_readable_is_a_failure_and_a_wrong_spec_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.png").write_bytes(b"")
    result = look(f"folder:{tmp_path}")
    assert result.exit_code == 1
    assert "1.pngisempty" in "".join(result.stdout.split())
    wrong = look("folder:/nowhere")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "There is no folder /nowhere" in wrong.stderr
