"""`fedhead site`: a site's own keys."""

from pathlib import Path
from typing import Annotated

import typer

from fedhead.cli import options
from fedhead.cli.application import app, in_sentences, output

site = typer.Typer(help="Make a site's own keys.", no_args_is_help=True)
app.add_typer(site, name="site")


@site.command(epilog="Example: [bold]fedhead site init hospital-a[/bold]")
@in_sentences
def init(
    name: Annotated[str, typer.Argument(help="The site's name.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder of the key; by default one of the site's name.")] = None,
    debug: options.Debug = False,
) -> None:
    """Make the site's private keys, which never leave this machine, and a request to register them."""
    from fedhead.certificates import fingerprint
    from fedhead.client.key import KEY_FILE, REQUEST_FILE, SEALING_FILE, make_key

    folder = out or Path(name)
    key = make_key(name, folder)
    output().print(
        f"Made {folder / KEY_FILE} and {folder / SEALING_FILE}, which stay here, and {folder / REQUEST_FILE}. Send the "
        f"request to the operator of the coordinator, who answers with site.toml, ca.pem and roster.toml; put them "
        f"into {folder}. Compare the key's fingerprint by telephone: {fingerprint(key)}. Accept the roster with "
        f"fedhead roster verify {folder}.",
        highlight=False,
        soft_wrap=True,
    )
