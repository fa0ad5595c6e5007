"""`fedhead generate`: answers of a tuned language model."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences
from fedhead.cli.predict import Device, Model, Weights, load_model

if TYPE_CHECKING:
    from fedhead.data.conversations import Turn


@app.command(epilog='Example: [bold]fedhead generate runs/support "Where is my card?"[/bold]')
@in_sentences
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; by default the lines of the standard input.")
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Conversations, as in jsonl:questions.jsonl, whose last answers are left out and generated. Each JSON "
            "line has prompt, gold (the answer left out) and output."
        ),
    ] = "",
    system: Annotated[str, typer.Option(help="Text that tells the model how to answer.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Largest number of tokens of an answer.")] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 for the most probable token each time; 1 draws tokens by their probabilities.")
    ] = 0.0,
    beams: Annotated[
        int, typer.Option(help="Answers that are continued side by side; the most probable one is taken.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    weights: Weights = "",
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for JSON lines with prompt and completion; with --data, with prompt, gold and output.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines instead of texts.", rich_help_panel=options.OUTPUT)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Generate answers with a model of the task 'generation'."""
    from fedhead.data import load_samples
    from fedhead.errors import UserError
    from fedhead.files import disk_errors
    from fedhead.generation import generate as answers
    from fedhead.generation import questions
    from fedhead.wording import printable, without_controls

    if data and prompts:
        raise UserError("Give prompts, or conversations with --data, not both.")
    known = list(questions(load_samples(data))) if data else []
    asked: list[Any] = [turns for turns, _ in known] if data else prompts or _standard_input()
    loaded = load_model(model, weights, device)
    made = answers(loaded, asked, system=system, max_tokens=max_tokens, temperature=temperature, beams=beams, seed=seed)
    lines = []
    for place, answer in enumerate(made):
        values = _with_gold(*known[place], answer) if data else {"prompt": asked[place], "completion": answer}
        # Texts of a model may hold commands to a terminal, which JSON leaves unescaped in part.
        lines.append(json.dumps(values, ensure_ascii=out is None))
        if out is None:
            typer.echo(lines[-1] if as_json else without_controls(answer))
    if out is not None:
        with disk_errors(out):
            out.write_text(printable("".join(f"{line}\n" for line in lines)), encoding="utf-8")


def _standard_input() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _with_gold(turns: "list[Turn]", gold: str, answer: str) -> dict[str, str]:
    """Return a line of FlowerTune's generations."""
    return {"prompt": "\n".join(said for _, said in turns), "gold": gold, "output": answer}
