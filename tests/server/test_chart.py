import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import typer
import yaml

from fedhead.cli import app

CHART = Path(__file__).parents[2] / "docs" / "deploy" / "helm" / "fedhead"
DIGEST = "sha256:" + "0" * 64


def values(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load((CHART / "values.yaml").read_text()), "kit": {"secret": "kit"}, **changes}


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"role": "coordinator", "runs": {"xray": "rounds = 1"}}, True),
        ({"image": {"repository": "r.example.org/fedhead", "digest": DIGEST}}, True),
        ({"role": "hospital"}, False),
        ({"kit": {"secret": ""}}, False),
        ({"runs": {"../xray": "rounds = 1"}}, False),
        ({"image": {"repository": "r.example.org/fedhead", "digest": "latest"}}, False),
        ({"replicas": 2}, False),
    ],
)
def test_the_schema_accepts_the_default_values_and_finds_mistakes(changes: dict[str, Any], valid: bool) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(values(**changes)) == valid


def test_every_flag_of_the_templates_is_one_of_the_command() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    text = (CHART / "templates" / "statefulset.yaml").read_text()
    part = text.partition("args:")[2].partition("env:")[0]
    server, _, rest = part.partition("- server")[2].partition("{{- else }}")
    client, _, both = rest.partition("- client")[2].partition("{{- end }}")
    for name, own in (("server", server), ("client", client)):
        known = {flag for one in group.commands[name].get_params(click.Context(group)) for flag in one.opts}
        asked = set(re.findall(r"- (--[a-z-]+)$", own + both, re.MULTILINE))
        assert asked >= {"--kit", "--health"}
        assert asked <= known, name


@pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm")
@pytest.mark.parametrize("role", ["coordinator", "site"])
def test_helm_renders_the_chart(role: str) -> None:
    given = ["--set", f"role={role},kit.secret=kit"]
    subprocess.run(["helm", "lint", "--strict", CHART, *given], check=True)
    made = subprocess.run(
        ["helm", "template", "xray", CHART, *given], check=True, capture_output=True, text=True
    ).stdout
    kinds = sorted(one["kind"] for one in yaml.safe_load_all(made) if one)
    expected = ["NetworkPolicy", "StatefulSet"]
    assert kinds == sorted([*expected, *(["ConfigMap", "Service"] if role == "coordinator" else [])])
