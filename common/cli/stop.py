"""`fedhead stop`: end a coordinator, which can be resumed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output


@app.command(epilog="Example: [bold]fedhead stop runs/xray[/bold]")
@in_sentences
def stop(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for its end.")] = 60.0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """End the coordinator of a run over a network; fedhead server --resume continues the run."""
    from fedhead.server.status import stop_run

    values = stop_run(run_dir, wait)
    if as_json:
        typer.echo(json.dumps(values))
        return
    done = len(values["history"])
    rounds = f"after round {values['history'][-1]['number']}" if done else "before its first head"
    sentence = {
        "finished": f"The run in {run_dir} is finished.",
        "interrupted": f"The run in {run_dir} is stopped {rounds}. Continue it with fedhead server --resume {run_dir}.",
    }.get(values["state"], f"The run in {run_dir} is not up: {values['message']}")
    output().print(sentence, highlight=False, soft_wrap=True)
