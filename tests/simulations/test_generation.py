"""Language models: adapters learn the answers in conversations, and are kept only if held-out ones prove it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedhead.backbones import load_backbone
from fedhead.cli import app
from fedhead.client.app import make_app
from fedhead.client.backbones import AcceptedBackbones
from fedhead.client.local_site import LocalSite
from fedhead.client.minibatches import shuffled
from fedhead.client.release.guard import Guard
from fedhead.client.release.training_limits import TrainingLimits
from fedhead.config import RunConfig
from fedhead.data import UnreadableSampleError, held_out, load_samples, samples_from_texts
from fedhead.data.conversations import Conversation
from fedhead.errors import FedheadError, UserError
from fedhead.generation import generate
from fedhead.model import TransferModel
from fedhead.simulations import simulate
from fedhead.simulations.result import RunResult

from ..common.backbones.tiny_language_model import tiny_language_model

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

UNGUARDED = {"min_class_count": 0, "min_rows": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two blocks, and 150 conversations whose answers follow from the questions."""
    folder = tmp_path_factory.mktemp("language")
    tiny_language_model(folder / "model")
    numbers = np.random.default_rng(0).integers(10, 99, 150)
    lines = [json.dumps({"prompt": f"Turn {one} around", "completion": f"It is {str(one)[::-1]}."}) for one in numbers]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder


def config(folder: Path, **values: Any) -> RunConfig:
    table = {"data": f"jsonl:{folder / 'talks.jsonl'}", "sites": 3, **UNGUARDED, **values.pop("simulation", {})}
    tune = {"layers": "lora:4@last:1", "lr": 0.02, **values.pop("tune", {})}
    settings = {"task": "generation", "backbone": f"hf:{folder / 'model'}", "tune": tune, "rounds": 2, **values}
    return RunConfig(**settings, simulation=table)


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return simulate(config(folder, with_backbone=True), out=tmp_path_factory.mktemp("tuned") / "run")


def test_proven_adapters_are_delivered(tuned: RunResult) -> None:
    figures = tuned.summary()
    assert figures["kept"] == "tuned"
    assert figures["score_name"] == "perplexity"
    assert figures["perplexity_held_out"] < figures["perplexity_solved"]
    assert figures["perplexity_worst_site"] == max(tuned.score_by_site.values())
    assert figures["trainable_parameters"] < 6000
    last = tuned.history[2]
    assert last.loss == pytest.approx(np.log(last.score), rel=1e-6)
    assert tuned.run_dir is not None
    evaluation = json.loads((tuned.run_dir / "evaluation.json").read_text())
    assert evaluation["before"]["pooled"]["perplexity"][0] == pytest.approx(tuned.history[0].score, rel=1e-4)
    assert evaluation["before"]["sites"].keys() == evaluation["sites"].keys()
    card, report = ((tuned.run_dir / name).read_text() for name in ("MODEL_CARD.md", "report.html"))
    assert "text-generation" in card
    assert "tokenizer.json" not in report
    assert not any("recipe" in (tuned.run_dir / name).read_text() for name in ("journal.json", "MODEL_CARD.md"))
    assert "fedhead generate" in card
    assert "Without the adapters it is" in report


def test_the_delivered_model_is_what_was_measured(tuned: RunResult, folder: Path) -> None:
    assert tuned.run_dir is not None
    model = TransferModel.load(tuned.run_dir)
    samples = load_samples(f"jsonl:{folder / 'talks.jsonl'}")
    talks = [samples.read(row) for row in range(len(samples))]
    keys = np.array([samples.key(row, talk) for row, talk in enumerate(talks)], np.uint64)
    kept = [talk for talk, out in zip(talks, held_out(keys, 0.2), strict=True) if out]
    loss, tokens, _ = model.backbone.features_of(kept).double().sum(0).tolist()
    assert np.exp(loss / tokens) == pytest.approx(tuned.score, rel=1e-4)


def test_one_site_learns_as_by_peft_and_torch(folder: Path, tmp_path: Path) -> None:
    """One round equals AdamW on PEFT's model of the whole, with the same minibatches."""
    import peft

    run = config(folder, rounds=1, simulation={"sites": 1}, tune={"batch_size": 16})
    result = simulate(run, out=tmp_path / "run")
    backbone = load_backbone(f"hf:{folder / 'model'}", layer="next-token")
    samples = load_samples(f"jsonl:{folder / 'talks.jsonl'}")
    talks = [samples.read(row) for row in range(len(samples))]
    keys = np.array([samples.key(row, talk) for row, talk in enumerate(talks)], np.uint64)
    train = [talk for talk, out in zip(talks, held_out(keys, 0.2), strict=True) if not out]
    module: Any = backbone.module
    layers = [name for name, one in module.model.named_modules() if "layers.1" in name and hasattr(one, "weight")]
    names = [name for name in layers if name.endswith("_proj")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.0, bias="none")
        whole = peft.get_peft_model(module.causal, settings)
    from fedhead.backbones.split import split
    from fedhead.tuning import parse_tune

    start = split(load_backbone(f"hf:{folder / 'model'}", layer="next-token"), parse_tune("lora:4@last:1"))
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        for name, value in start.tail.trainable().items():
            parameters[f"base_model.model.model.{name}"].copy_(value)
    trained = [one for one in whole.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    prepared = [backbone.preprocessing(talk) for talk in train]
    mean = float(np.mean([int(one[:, 1].sum()) for one in prepared]))
    order = shuffled(0, "site-0", 1, 0, len(train))
    for first in range(0, len(train), 16):
        batch = backbone.preprocessing.collate([prepared[row] for row in order[first : first + 16]])
        loss = module(**batch)[:, 0].mean() / mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probes = backbone.preprocessing.probes()
    with torch.no_grad():
        expected = backbone.features_of(probes)
    torch.testing.assert_close(result.model.backbone.features_of(probes), expected, rtol=2e-3, atol=1e-2)


def test_adapters_that_gain_nothing_leave_the_base_model(folder: Path, tmp_path: Path) -> None:
    idle = simulate(config(folder, tune={"lr": 1e-12}, rounds=1), out=tmp_path / "idle")
    figures = idle.summary()
    assert (figures["kept"], figures["kept_round"]) == ("base", 0)
    assert figures["perplexity"] == pytest.approx(idle.history[0].score, rel=1e-4)
    assert not (tmp_path / "idle" / "tail.safetensors").exists()
    base = load_backbone(f"hf:{folder / 'model'}", layer="next-token")
    assert idle.model.backbone.digest == base.digest
    assert "base model is delivered" in (tmp_path / "idle" / "MODEL_CARD.md").read_text()


def test_secure_sums_give_the_same_adapters(tuned: RunResult, folder: Path, tmp_path: Path) -> None:
    secure = simulate(config(folder, privacy={"secure_sum": True}), out=tmp_path / "secure")
    np.testing.assert_allclose([one.loss for one in secure.history], [one.loss for one in tuned.history], rtol=1e-3)
    evaluation = json.loads((tmp_path / "secure" / "evaluation.json").read_text())
    assert evaluation["before"]["sites"] == {}


def test_real_sites_give_the_same_adapters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHEAD_HOME", str(tmp_path / "home"))
    lines = (folder / "talks.jsonl").read_text().splitlines()
    accepted = AcceptedBackbones(frozenset({f"hf:{folder / 'model'}"}))
    rows, apps = [range(60), range(60, 150)], {}
    for number, own in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines[row] for row in own))
        data = f"jsonl:{tmp_path / str(number)}.jsonl"
        site = LocalSite(f"site-{number}", data, "cpu", guard=Guard(0, 0), backbones=accepted)
        apps[site.name] = make_app(lambda context, site=site: site)
    run = config(folder)
    simulated = simulate(run, sites=rows, out=tmp_path / "simulated")
    real = simulate(run, sites=rows, apps=apps, out=tmp_path / "real")
    np.testing.assert_allclose([one.loss for one in real.history], [one.loss for one in simulated.history], rtol=1e-3)
    assert real.summary()["kept"] == simulated.summary()["kept"]
    (ledger,) = (tmp_path / "home").rglob("*site-0*.jsonl")
    assert "train" in ledger.read_text()
    limits = TrainingLimits(max_trainable=10)
    site = LocalSite("site-0", f"jsonl:{tmp_path}/0.jsonl", "cpu", training=limits, backbones=accepted)
    apps["site-0"] = make_app(lambda context: site)
    limited = simulate(run, sites=rows, apps=apps, out=tmp_path / "limited")
    assert "at most 10 parameters" in limited.outcome.refused["site-0"]


def test_unreadable_conversations_are_counted(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "talks.jsonl").read_text().splitlines()
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, '{"prompt": "a", "completion": ""}', '{"prompt": "a"}']))
    data = f"jsonl:{tmp_path / 'some.jsonl'}"
    result = simulate(config(folder, rounds=1, simulation={"sites": 1}), data, out=tmp_path / "run")
    assert result.summary()["rows_skipped"] == 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"backbone": "bundled:glyphnet"}, "needs a causal language model"),
        ({"tune": {"layers": "last:1"}}, "trains adapters"),
        ({"rounds": 0}, "set rounds to 1"),
        ({"head": "cosine"}, "takes no head"),
        ({"classes": ["a", "b"]}, "takes no classes"),
        ({"worth": True}, "takes no worth"),
        ({"sensitivity": 0.9}, "ensitivity is about classes"),
        ({"personal": "head"}, "ersonal heads"),
        ({"privacy": {"epsilon": 1.0}}, "ifferential"),
        ({"tune": {"layers": "lora:4@last:9"}}, "too many"),
    ],
)
def test_impossible_runs_are_refused_before_they_start(
    folder: Path, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        simulate(config(folder, **values), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_without_conversations_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(UserError, match="its data holds none"):
        simulate(config(folder), f"jsonl:{tmp_path / 'texts.jsonl'}", out=tmp_path / "run")


def test_answers_are_those_of_transformers(tuned: RunResult) -> None:
    model = tuned.model
    (answer, other) = generate(model, ["Turn 12 around", [("user", "a"), ("assistant", "b"), ("user", "c")]])
    assert (answer, other) == tuple(
        generate(model, ["Turn 12 around", [("user", "a"), ("assistant", "b"), ("user", "c")]])
    )
    drawn = [next(generate(model, ["Turn 12 around"], temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert next(generate(model, ["Turn 12 around"], temperature=2, seed=1)) is not None
    for wrong in ({"max_tokens": 0}, {"max_tokens": 10**6}, {"temperature": -1.0}):
        with pytest.raises(UserError, match="not"):
            next(generate(model, ["a"], **wrong))


def test_commands_generate_evaluate_and_export(tuned: RunResult, folder: Path, tmp_path: Path) -> None:
    assert tuned.run_dir is not None
    run = str(tuned.run_dir)

    def called(*flags: str) -> Any:
        return CliRunner().invoke(app, list(flags))

    made = called("generate", run, "Turn 12 around", "--max-tokens", "5", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["prompt"] == "Turn 12 around"
    judged = called("evaluate", run, "--data", f"jsonl:{folder / 'talks.jsonl'}", "--json")
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["score_name"] == "perplexity"
    (tmp_path / "note.txt").write_text("a text")
    assert called("predict", run, str(tmp_path / "note.txt")).exit_code == 2
    assert called("export", run, "--format", "onnx").exit_code == 2
    whole = called("export", run, "--format", "fedhead", "--out", str(tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    again = called("generate", str(tmp_path / "whole"), "Turn 12 around", "--max-tokens", "5", "--json")
    assert again.stdout == made.stdout


def test_adapters_are_loaded_by_peft_for_causal_models(tuned: RunResult, folder: Path, tmp_path: Path) -> None:
    """This is how FlowerTune's evaluation loads a submission."""
    from peft import AutoPeftModelForCausalLM

    done = CliRunner().invoke(
        app, ["export", str(tuned.run_dir), "--format", "peft", "--out", str(tmp_path / "adapter")]
    )
    assert done.exit_code == 0, done.output
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].base_model_name_or_path == str((folder / "model").resolve())
    ids = torch.tensor([[5, 6, 7, 8]])
    module: Any = tuned.model.backbone.module
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.causal(ids).logits, rtol=1e-4, atol=1e-4)
    shutil.rmtree(tmp_path / "adapter")


def test_other_models_do_not_generate() -> None:
    from fedhead.heads import LinearHead

    model = TransferModel(load_backbone("bundled:glyphnet"), LinearHead(192, 2), ["a", "b"])
    with pytest.raises(UserError, match="does not generate"):
        next(generate(model, ["a"]))


def test_a_single_text_is_one_prompt(tuned: RunResult) -> None:
    (answer,) = generate(tuned.model, "Turn 12 around", max_tokens=4)
    assert [answer] == list(generate(tuned.model, ["Turn 12 around"], max_tokens=4))


def test_conversations_in_memory_are_those_of_a_file(folder: Path) -> None:
    samples = load_samples(f"jsonl:{folder / 'talks.jsonl'}")
    talks = [samples.read(row) for row in range(5)]
    made = samples_from_texts(talks)
    assert [made.read(row).turns for row in range(5)] == [talk.turns for talk in talks]
    assert (made.annotated, made.classes, len(made)) == (samples.annotated, (), 5)
    assert made.fingerprint != samples_from_texts(talks[1:]).fingerprint
    with pytest.raises(UserError, match="with labels"):
        samples_from_texts(talks, ["a"] * 5)
    with pytest.raises(UserError, match="other texts"):
        samples_from_texts([*talks, "a text"], ["a"] * 6)
    with pytest.raises(UnreadableSampleError, match="does not end with an answer"):
        samples_from_texts([Conversation([("user", "Hi")])]).read(0)


def test_the_report_names_adapters(tuned: RunResult) -> None:
    assert tuned.run_dir is not None
    report = (tuned.run_dir / "report.html").read_text()
    assert "adapters of round" in report
    assert "Adapters, sums and counts." in report
    assert not any(
        words in report
        for words in ("Sums, heads and counts", "head of round", "first head", "initial head", "each head", "and head")
    )


def test_adapters_alone_give_the_delivered_model(folder: Path, tmp_path: Path) -> None:
    """The run's folder holds the adapters, and the pretrained weights are found by their digest."""
    run = simulate(config(folder, rounds=1), out=tmp_path / "run")
    assert run.summary()["kept"] == "tuned"
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    model = TransferModel.load(tmp_path / "run")
    assert (model.backbone.digest, model.backbone.weights_digest) == (
        run.model.backbone.digest,
        run.model.backbone.weights_digest,
    )
    torch.testing.assert_close(model.backbone.probe(), run.model.backbone.probe())
    base = load_backbone(f"hf:{folder / 'model'}", layer="next-token")
    assert float((base.probe() - model.backbone.probe()).abs().max()) > 0.01
    given = TransferModel.load(tmp_path / "run", base)
    torch.testing.assert_close(given.backbone.probe(), run.model.backbone.probe())
    base.save(tmp_path / "base.safetensors")
    by_file = TransferModel.load(tmp_path / "run", weights=str(tmp_path / "base.safetensors"))
    torch.testing.assert_close(by_file.backbone.probe(), run.model.backbone.probe())
    other = load_backbone(f"hf:{folder / 'model'}", layer="next-token", weights="random", seed=5)
    with pytest.raises(UserError, match="needs another backbone"):
        TransferModel.load(tmp_path / "run", other)
    file = tmp_path / "run" / "tail.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(UserError, match="damaged"):
        TransferModel.load(tmp_path / "run")
    file.unlink()
    with pytest.raises(FedheadError, match="are not on this machine"):
        TransferModel.load(tmp_path / "run")


def test_adapters_with_a_frozen_matrix_are_found_again(folder: Path, tmp_path: Path) -> None:
    run = simulate(config(folder, rounds=1, tune={"layers": "lora:4:ffa@last:1", "lr": 0.05}), out=tmp_path / "run")
    assert run.summary()["kept"] == "tuned"
    torch.testing.assert_close(TransferModel.load(tmp_path / "run").backbone.probe(), run.model.backbone.probe())


def test_weights_from_elsewhere_stay_in_the_folder(folder: Path, tmp_path: Path) -> None:
    base = load_backbone(f"hf:{folder / 'model'}", layer="next-token", weights="random", seed=3)
    base.save(tmp_path / "own.safetensors")
    run = simulate(config(folder, rounds=1, weights=str(tmp_path / "own.safetensors")), out=tmp_path / "run")
    assert run.summary()["kept"] == "tuned"
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    (tmp_path / "own.safetensors").unlink()
    torch.testing.assert_close(TransferModel.load(tmp_path / "run").backbone.probe(), run.model.backbone.probe())


def test_answers_to_a_file_are_compared_with_its_references(
    tuned: RunResult, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The columns are those of FlowerTune's files of generations."""
    lines = [
        *(folder / "talks.jsonl").read_text().splitlines()[:2],
        json.dumps({"prompt": "lonely"}),
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "A"},
                    {"role": "assistant", "content": "B"},
                    {"role": "user", "content": "C"},
                    {"role": "assistant", "content": "D"},
                ]
            }
        ),
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines[:3]))
    (tmp_path / "talks.jsonl").write_text(lines[3])
    run, out = str(tuned.run_dir), tmp_path / "answers.jsonl"

    def answered(data: str, *more: str) -> Any:
        flags = ["generate", run, "--data", data, "--max-tokens", "4", "--out", str(out), *more]
        return CliRunner().invoke(app, flags)

    done = answered(f"jsonl:{tmp_path / 'pairs.jsonl'}")
    assert done.exit_code == 0, done.output
    made = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [json.loads(line) for line in lines[:2]]
    assert [(one["prompt"], one["gold"]) for one in made] == [(one["prompt"], one["completion"]) for one in asked]
    assert [one["output"] for one in made] == list(
        generate(tuned.model, [one["prompt"] for one in asked], max_tokens=4)
    )
    assert "has no completion" in caplog.text
    assert answered(f"jsonl:{tmp_path / 'talks.jsonl'}").exit_code == 0
    (talk,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (talk["prompt"], talk["gold"]) == ("S\nA\nB\nC", "D")
    assert answered("digits").exit_code == 2
    assert answered(f"jsonl:{tmp_path / 'talks.jsonl'}", "Hi").exit_code == 2
