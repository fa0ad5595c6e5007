"""Every code block of the README and of docs/ is checked: Python runs, settings are read, commands are parsed or run.

A shell block after `<!-- run -->` is run, in the order of the page; all other commands go through the real parser, and
their settings through `RunConfig`. A block that cannot be tested has the title "Not tested here: REASON".
"""

import ast
import glob
import importlib
import importlib.util
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedhead.backbones import backbone_sources
from fedhead.cli import app, options
from fedhead.client.settings import SiteSettings
from fedhead.config import PrivacyConfig, RunConfig, SimulationConfig, parse_assignments
from fedhead.data import sources
from fedhead.files import home
from fedhead.heads import make_head
from fedhead.server.observer import Observer
from fedhead.server.strategies import build_strategy
from fedhead.simulations import simulate
from fedhead.simulations.partition import partitions
from fedhead.simulations.study import parse_sweep
from fedhead.tasks import tasks

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?$')
NOT_TESTED = "Not tested here: "
OTHER_PROGRAMS = {"pytest", "mkdocs", "flwr", "flower-supernode"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    place: str
    language: str
    title: str
    text: str
    run: bool


@dataclass(frozen=True)
class Command:
    """A command of a shell block, and the file that its output goes to."""

    words: list[str]
    output: str


def blocks_of(page: Path) -> list[Block]:
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start = 0
    while start < len(lines):
        if not lines[start].startswith("```"):
            start += 1
            continue
        opening = FENCE.match(lines[start])
        place = f"{page.relative_to(ROOT)}:{start + 1}"
        assert opening, f"{place}: a block opens with a language, and perhaps a title"
        end = lines.index("```", start + 1)
        run = start > 0 and lines[start - 1] == "<!-- run -->"
        text = "\n".join(lines[start + 1 : end])
        found.append(Block(place, opening["language"], opening["title"] or "", text, run))
        start = end + 1
    return found


def commands_of(text: str) -> Iterator[Command]:
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"\w+=", line):
            continue
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        words.whitespace_split = True
        command, output, redirected = [], "", False
        for word in [*words, ";"]:
            if redirected:
                output, redirected = word, False
            elif word == ">":
                redirected = True
            elif word in ("&&", "|", ";"):
                if command:
                    yield Command(command, output)
                command, output = [], ""
            else:
                command.append(word)


# Stand-ins for files of the user's, by page.


def digit(path: Path, number: int = 0) -> None:
    """Write a picture of a digit, white on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = load_digits().images[number] * 15.9
    Image.fromarray(pixels.astype(np.uint8)).resize((64, 64)).save(path)


def photographs(folder: Path, classes: Sequence[str] = ("dark", "bright"), per_class: int = 60) -> None:
    """Write a sub-folder of pictures per class, whose brightness gives it away."""
    generator = np.random.default_rng(len(classes))
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = generator.integers(0, 90, (24, 24, 3)) + 160 * label // max(len(classes) - 1, 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


def table(path: Path, header: str, row: Callable[[int], str], rows: int = 120) -> None:
    path.write_text("\n".join([header, *map(row, range(rows))]) + "\n", encoding="utf-8")


def data_page(folder: Path) -> None:
    photographs(folder / "photographs" / "train")
    pictures = sorted(Path("photographs/train").rglob("*.png"))
    table(
        folder / "scans.csv",
        "path,finding,patient,split",
        lambda number: f"{pictures[number]},{pictures[number].parent.name},p{number % 40},train",
    )
    table(
        folder / "wards.csv",
        "age,pulse,stage,disease",
        lambda n: f"{40 + n % 30},{0 if n % 7 == 0 else 60 + 30 * (n % 2)},{'I' * (1 + n % 3 // 2)},{'ny'[n % 2]}",
    )
    labels, bags = np.array(["low", "high"] * 60), np.array([f"slide {n // 4 * 2 + n % 2}" for n in range(120)])
    embeddings = np.random.default_rng(0).normal(size=(120, 4)) + (np.arange(120) % 2)[:, None]
    np.savez(folder / "slides.npz", features=embeddings, labels=labels, bags=bags)
    table(folder / "heart.csv", "age,pulse,disease", lambda n: f"{40 + n % 30},{60 + 30 * (n % 2)},{'ny'[n % 2]}")


def sounds_page(folder: Path) -> None:
    from wave import open as open_wave

    for number in range(80):
        name = ("high", "low")[number % 2]
        path = folder / "recordings" / name / f"{number // 2}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(2 * np.pi * (800 - 500 * (number % 2) + number) * np.arange(2400 + 20 * number) / 8000)
        with open_wave(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes((9000 * tone).astype("<i2").tobytes())
    rows = [f"recordings/{name}/{number}.wav,{name},p{number % 7}" for name in ("high", "low") for number in range(40)]
    (folder / "recordings.csv").write_text("\n".join(["path,label,speaker", *rows]) + "\n", encoding="utf-8")


def segmentation_page(folder: Path) -> None:
    for name in ("images", "masks"):
        (folder / "cells" / name).mkdir(parents=True)
    for number in range(60):
        mask = np.zeros((64, 64), np.uint8)
        mask[number % 30 : number % 30 + 24, 20:44] = 255
        pixels = np.random.default_rng(number).integers(0, 60, (64, 64, 3)) + (mask[..., None] > 0) * 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "cells" / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "cells" / "masks" / f"{number}.png")
    table(folder / "cells" / "index.csv", "id,laboratory,patient", lambda n: f"{n},{'ab'[n % 2]},p{n % 20}", 60)


def tasks_page(folder: Path) -> None:
    pictures = folder / "pictures"
    photographs(pictures)
    files = sorted(pictures.rglob("*.png"))
    table(
        folder / "findings.csv",
        "path,label",
        lambda n: f"pictures/{files[n].relative_to(pictures)},{('a', 'b', 'a;b')[n % 3]}",
    )
    table(folder / "grades.csv", "age,grade", lambda n: f"{30 + n % 40},{n % 40 // 14}")
    table(
        folder / "follow-up.csv",
        "age,days,died",
        lambda n: f"{30 + n % 40},{400 - 7 * (n % 40)},{(n + n // 40) % 2}",
        240,
    )
    generator = np.random.default_rng(0)
    table(
        folder / "patients.csv",
        "age,bmi,pressure,sugar",
        lambda n: ",".join(f"{value:.3f}" for value in generator.normal(size=4)),
    )


class Killed(Observer):
    """Ends a run after its first round, as a kill would."""

    def on_round(self, finished: Any) -> None:
        if finished.number == 1:
            raise KeyboardInterrupt


def interrupted(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate(RunConfig(rounds=2), "digits", 3, out=folder / "runs" / "interrupted", observers=[Killed()])


def first_run(folder: Path) -> None:
    simulate(RunConfig(rounds=1, with_backbone=True), "digits", 10, out=folder / "runs" / "first")


def membership_page(folder: Path) -> None:
    first_run(folder)
    photographs(folder / "photographs" / "train")
    photographs(folder / "photographs" / "orchids", ("orchid",))
    simulate(RunConfig(rounds=0), f"folder:{folder}/photographs/train", 3, out=folder / "runs" / "flowers")


def questions_page(folder: Path) -> None:
    config = RunConfig(rounds=0, with_backbone=True, simulation={"min_class_count": 0, "min_rows": 0})
    simulate(config, "digits", 4, out=folder / "runs" / "first")
    digit(folder / "new.png", 3)


def fairness_page(folder: Path) -> None:
    photographs(folder / "photographs")
    config = RunConfig(rounds=0, with_backbone=True, simulation={"min_class_count": 0, "min_rows": 0})
    simulate(config, f"folder:{folder}/photographs", 3, out=folder / "runs" / "scans")
    files = sorted(Path("photographs").rglob("*.png"))
    table(folder / "scans.csv", "path,finding,sex", lambda n: f"{files[n]},{files[n].parent.name},{'fm'[n % 2]}")


def foreign_page(folder: Path) -> None:
    for number in range(30):
        digit(folder / "today" / f"{number}.png", number)


def similar_page(folder: Path) -> None:
    digit(folder / "one.png", 1)
    digit(folder / "other.png", 11)


def tagging_page(folder: Path) -> None:
    names = {"Anna": "B-person", "Bruno": "B-person", "Oslo": "B-place", "Rome": "B-place"}
    vectors = {word: (3, 0, number) for number, word in enumerate(("in", "lives", "works", "."))}
    vectors |= {name: (0, 5 * (tag == "B-person"), 5 * (tag == "B-place")) for name, tag in names.items()}
    rows = [f"{word} {' '.join(map(str, values))}" for word, values in vectors.items()]
    (folder / "vectors.txt").write_text("\n".join(rows) + "\n")
    lines = []
    for number in range(80):
        person, verb = ("Anna", "Bruno")[number % 2], ("lives", "works")[number // 2 % 2]
        words = (*[person] * (number // 4 % 3), verb, "in", ("Oslo", "Rome")[number % 3 % 2], ".")
        lines += [*(f"{word} s{number % 2} {names.get(word, 'O')}" for word in words), ""]
    (folder / "notes.txt").write_text("\n".join(lines))
    (folder / "letter.txt").write_text("Anna lives in Oslo.")


def model_page(folder: Path) -> None:
    first_run(folder)
    digit(folder / "new.png", 3)
    for number, label in enumerate(load_digits().target[:40]):
        digit(folder / "digits" / "test" / str(label) / f"{number}.png", number)


STAND_INS: Mapping[str, Callable[[Path], None]] = {
    "README.md": lambda folder: digit(folder / "seven.png", 7),
    "docs/tutorials/first-simulation.md": lambda folder: (first_run(folder), digit(folder / "new.png", 3))[1],
    "docs/tutorials/own-backbone.md": lambda folder: photographs(folder / "photographs"),
    "docs/how-to/data.md": data_page,
    "docs/how-to/segmentation.md": segmentation_page,
    "docs/how-to/sounds.md": sounds_page,
    "docs/how-to/tasks.md": tasks_page,
    "docs/how-to/use-a-model.md": model_page,
    "docs/how-to/fairness.md": fairness_page,
    "docs/how-to/foreign-inputs.md": foreign_page,
    "docs/how-to/similar.md": similar_page,
    "docs/how-to/tagging.md": tagging_page,
    "docs/how-to/membership.md": membership_page,
    "docs/how-to/questions.md": questions_page,
    "docs/how-to/large-simulations.md": interrupted,
}


# Checks of a command that is not run.


def leaf(words: Sequence[str]) -> tuple[click.Command, click.Context]:
    """Parse the words after `fedhead` with the real command line, down to the command that they name."""
    command: click.Command = typer.main.get_command(app)
    context, rest = command.make_context("fedhead", list(words)), list(words)
    while isinstance(command, click.Group):
        _, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        context = found.make_context(found.name, rest, parent=context)
        command = found
    return command, context


def check_settings(values: Mapping[str, Any], folder: Path) -> None:
    """Check that what a command names exists: settings, sources, strategies, and what is swept."""
    values = {name: value for name, value in values.items() if value is not None}
    top = {name: value for name, value in values.items() if name in RunConfig.model_fields}
    if "classes" in top:
        top["classes"] = top["classes"].split(",")
    below = {name: value for name, value in values.items() if name in SimulationConfig.model_fields}
    given = values.get("config")
    privacy = {name: value for name, value in values.items() if name in PrivacyConfig.model_fields}
    path = folder / given if given and (folder / given).is_file() else None
    config = options.run_config(path, values.get("set_"), {**top, "privacy": privacy, "simulation": below})
    backbone_sources[config.backbone.partition(":")[0]]
    sources[config.simulation.data.partition(":")[0]]
    partitions[config.simulation.partition.partition(":")[0]]
    tasks[config.task]
    make_head(config.head, 4, 2)
    build_strategy(config.strategy)
    for key, swept in parse_sweep(values.get("sweep") or []).items():
        for value in swept:
            where = key if "." in key or key in RunConfig.model_fields else f"simulation.{key}"
            changed = config.changed(parse_assignments([f"{where}={value}"]))
            build_strategy(changed.strategy)
            partitions[changed.simulation.partition.partition(":")[0]]


def check(command: Command, folder: Path) -> None:
    program, *rest = command.words
    if program == "fedhead":
        if rest:
            found, context = leaf(rest)
            if found.name in ("simulate", "server", "rank", "flower-app"):
                check_settings(context.params, folder)
    elif command.words[:4] == ["python", "-m", "pip", "install"]:
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", command.words[4])
        assert extras, f"{command.words[4]} is not installed from here"
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set((extras[1] or "").split(",")) - {""} <= known.keys()
    elif command.words[:2] == ["python", "-m"]:
        check_module(command.words[2], command.words[3:])
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not a program that these pages may name"


def check_module(name: str, words: Sequence[str]) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        for path in Path(module.__path__[0]).glob("[a-z]*.py"):
            importlib.import_module(f"{name}.{path.stem}")
        group = typer.main.get_command(importlib.import_module(f"{name}.measurement").app)
    else:
        single = typer.Typer()
        single.command()(module.main)
        group = typer.main.get_command(single)
    context = group.make_context(name, list(words))
    if isinstance(group, click.Group):
        _, found, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        found.make_context(found.name, rest, parent=context)


# Running.


def run(command: Command, folder: Path) -> None:
    assert command.words[0] == "fedhead", f"only fedhead is run, not {command.words[0]}"
    words = [match for word in command.words[1:] for match in (sorted(glob.glob(word)) or [word])]  # noqa: PTH207
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"fedhead {shlex.join(words)}: {result.output}"
    if command.output:
        (folder / command.output).write_text(result.stdout)


def hold(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run or check a block; `names` are those of the page's Python blocks so far."""
    if block.title.startswith("Not tested"):
        assert block.title.startswith(NOT_TESTED), f"give the reason, as in {NOT_TESTED!r} and why"
        assert len(block.title) > len(NOT_TESTED) + 5
        if block.language == "python":
            imports = [line for line in ast.parse(block.text).body if isinstance(line, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), block.place, "exec"), names)
    elif block.language == "python":
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        exec(compile(block.text, block.place, "exec"), names)
    elif block.language == "toml":
        if block.title == "site.toml":
            SiteSettings.from_values(tomllib.loads(block.text), block.place)
        else:
            assert block.title == "run.toml", "a TOML block is run.toml or site.toml, by its title"
            (folder / "run.toml").write_text(block.text, encoding="utf-8")
            RunConfig.from_toml(folder / "run.toml")
    elif block.language == "sh":
        for command in commands_of(block.text):
            check(command, folder)
            if block.run:
                run(command, folder)
    else:
        assert block.language == "text", f"a block in {block.language or 'no language'} is not checked by this test"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A page's own folder, as the current one; modules that a page writes are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    # A site's ledger knows earlier releases, and pages use the same names for sites with other rows.
    shutil.rmtree(home() / "ledger", ignore_errors=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_block_of_a_page_holds(page: Path, folder: Path) -> None:
    blocks = blocks_of(page)
    if blocks and (stand_ins := STAND_INS.get(str(page.relative_to(ROOT)))):
        stand_ins(folder)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        try:
            hold(block, folder, names)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "fedhead simulate --no-such-flag"),
        ("sh", "fedhead no-such-command"),
        ("sh", "fedhead simulate --backbone nowhere:resnet18"),
        ("sh", "fedhead simulate --set strategy.name=FedNothing"),
        ("sh", "fedhead simulate --sweep local.nothing=1"),
        ("sh", "python -m fedhead.simulations.benchmarks nothing"),
        ("sh", "python -m pip install '.[nothing]'"),
        ("sh", "some-other-program"),
        ("python", "from fedhead import nothing"),
        ("toml", 'nothing = "1"'),
        ("yaml", "a: 1"),
    ],
)
def test_a_wrong_block_fails(language: str, text: str, folder: Path) -> None:
    with pytest.raises((Exception, SystemExit)):
        hold(Block("here", language, "run.toml" if language == "toml" else "", text, run=False), folder, {})


# What stands in the text.


def all_flags() -> set[str]:
    found = {"--help"}
    pending: list[click.Command] = [typer.main.get_command(app)]
    while pending:
        command = pending.pop()
        if isinstance(command, click.Group):
            pending += command.commands.values()
        named = (
            name for one in command.get_params(click.Context(command)) for name in (*one.opts, *one.secondary_opts)
        )
        found |= {name for name in named if name.startswith("--")}
    return found


def inline_code() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        found += [(str(page.relative_to(ROOT)), code) for code in re.findall(r"`([^`\n]+)`", text)]
    return found


def test_flags_and_commands_in_the_text_exist() -> None:
    flags = all_flags()
    commands = typer.main.get_command(app)
    assert isinstance(commands, click.Group)
    for page, code in inline_code():
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", code):
            assert flag in flags, f"{page}: there is no flag {flag}"
        if match := re.match(r"fedhead ([a-z-]+)", code):
            assert match[1] in commands.commands, f"{page}: there is no command {match[1]}"


def test_names_and_files_in_the_text_exist() -> None:
    for page, code in inline_code():
        if re.fullmatch(r"fedhead(\.\w+)+", code):
            module, _, name = code.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{page}: there is no {code}"
        elif re.fullmatch(r"(tests|examples)/[\w/.]+", code):
            assert (ROOT / code).exists(), f"{page}: there is no file {code}"
        elif match := re.fullmatch(r"(local|simulation)\.(\w+)", code):
            assert match[2] in type(getattr(RunConfig(), match[1])).model_fields, f"{page}: no setting {code}"


def test_the_readme_links_to_files_that_exist_and_fits_on_a_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https://")]
    assert len(links) > 15
    for link in links:
        assert (ROOT / link).exists(), link
    assert len(text.splitlines()) <= 160


# The scripts and the generated pages.


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("first_simulation.py", r"accuracy 9\d\.\d%"),
        ("own_backbone.py", r"accuracy 9\d\.\d% with 512 features"),
        ("own_strategy.py", r"9\d\.\d%$"),
        ("own_task.py", r"R2 1\.00 on held-out rows; 100% of counts are exact"),
    ],
)
def test_an_example_runs(script: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "examples" / script, folder)
    importlib.import_module(script.removesuffix(".py")).main()
    assert re.search(says, capsys.readouterr().out.strip())


def test_the_reference_names_every_setting_and_command() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    settings, commands = hooks.run_settings(), hooks.commands()
    for name in [*RunConfig.model_fields, *PrivacyConfig.model_fields, *SimulationConfig.model_fields]:
        assert f"`{name}`" in settings or f"[{name}]" in settings
    without_meaning = [line for line in settings.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not without_meaning, without_meaning
    for flag in all_flags() - {"--help", "--version"}:
        assert f"`{flag}`" in commands
