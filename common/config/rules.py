"""Rules over several settings of a run: which go together."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedhead.config.fields import DENSE_LAYERS, GENERATION, GENERATION_COLUMNS, SUBGROUPED
from fedhead.config.tables import LocalConfig, TuneConfig
from fedhead.tuning import NEXT_TOKEN, parse_tune

if TYPE_CHECKING:
    from fedhead.config.run import RunConfig


RULES: list[Callable[["RunConfig"], None]] = []
"""Each raises ValueError with what is wrong; the first one is reported."""


def _rule(check: Callable[["RunConfig"], None]) -> Callable[["RunConfig"], None]:
    RULES.append(check)
    return check


@_rule
def _a_classifier_has_classes(run: "RunConfig") -> None:
    if run.task in ("classification", "multi-label") and len(run.classes) == 1:
        raise ValueError(f"a classifier needs two classes or more, not only {run.classes[0]!r}")


@_rule
def _full_gradients_are_of_linear_heads(run: "RunConfig") -> None:
    if run.strategy.name == "pooled-lbfgs":
        if run.head != "linear":
            raise ValueError(f"pooled-lbfgs trains a 'linear' head, not {run.head!r}")
        if run.task in ("regression", "ordinal", "survival", "tagging", *DENSE_LAYERS):
            raise ValueError(f"pooled-lbfgs is for classes; one exchange already solves the task {run.task!r}")


@_rule
def _worth_needs_each_sites_sums(run: "RunConfig") -> None:
    if run.worth and "keep_sums" in run.model_fields_set and run.keep_sums != "folder":
        raise ValueError("worth compares the sites' own sums, so it needs keep_sums = 'folder'")


@_rule
def _personal_heads_are_of_classes(run: "RunConfig") -> None:
    if run.personal != "none" and run.task != "classification":
        raise ValueError(f"personal heads are for task 'classification', not {run.task!r}")
    if run.personal == "closed" and run.init in ("zeros", "random"):
        raise ValueError("personal = 'closed' needs pooled sums: choose an init that is solved, such as 'lda'")


@_rule
def _subgroups_are_of_classified_rows(run: "RunConfig") -> None:
    if run.sensitivity and run.task not in SUBGROUPED:
        raise ValueError(f"sensitivity is about classes of rows, and task {run.task!r} has none: leave it out")
    if run.sensitivity and len(run.classes) not in (0, 2):
        raise ValueError(f"sensitivity is for two classes; this run has {len(run.classes)}")
    if not run.subgroups:
        return
    if run.task not in SUBGROUPED:
        raise ValueError(f"subgroups are for the tasks {' and '.join(map(repr, SUBGROUPED))}, not {run.task!r}")
    if run.privacy.on:
        raise ValueError("subgroups need exact counts, which differential privacy does not give: leave one out")


@_rule
def _adapted_heads_are_solved(run: "RunConfig") -> None:
    if not run.adapt:
        return
    if run.task != "classification" or run.head != "linear" or run.init in ("zeros", "random"):
        raise ValueError("adapt is for task 'classification' with a solved 'linear' head")
    if "rounds" in run.model_fields_set and run.rounds:
        raise ValueError("adapt solves heads from sums: set rounds to 0")
    if run.privacy.on:
        raise ValueError("adapt needs exact sums, which differential privacy does not give: leave epsilon out")


@_rule
def _masks_and_noise_need_float64(run: "RunConfig") -> None:
    if run.wire == "float32" and (run.privacy.secure_sum or run.privacy.on):
        raise ValueError("wire 'float32' is for plain sums: leave it at 'float64' under secure_sum or with epsilon")


@_rule
def _robust_pooling_needs_sums(run: "RunConfig") -> None:
    if run.pooling == "robust" and run.keep_sums != "folder":
        raise ValueError("pooling 'robust' compares single sites' sums: leave keep_sums at 'folder'")
    if run.pooling == "robust" and run.privacy.secure_sum:
        raise ValueError("pooling 'robust' compares single sites' sums, which secure_sum hides")


@_rule
def _clusters_have_no_labels(run: "RunConfig") -> None:
    if run.task != "clusters":
        if run.clusters:
            raise ValueError("clusters is the number of clusters for task 'clusters' (--task clusters)")
        return
    if run.clusters == 1:
        raise ValueError("clusters must be 2 or more, or 0 to choose the number")
    needless = {
        "head": "linear",
        "lift": "none",
        "pooling": "sum",
        "classes_from": "",
        "foreign": False,
        "worth": False,
    }
    if wrong := [name for name, value in needless.items() if getattr(run, name) != value]:
        raise ValueError(f"task 'clusters' takes no {wrong[0]}: rows have no labels before clusters are found")
    if "rounds" in run.model_fields_set and run.rounds:
        raise ValueError("task 'clusters' solves its head from sums: set rounds to 0")
    if run.simulation.test_data:
        raise ValueError("task 'clusters' takes no test_data: name the clusters, then use fedhead evaluate")


@_rule
def _places_are_learned_from_sums(run: "RunConfig") -> None:
    if run.task not in DENSE_LAYERS:
        return
    plain = {
        "basis": "none",
        "lift": "none",
        "head": "linear",
        "pooling": "sum",
        "worth": False,
        "foreign": False,
    }
    if wrong := [name for name, value in plain.items() if getattr(run, name) != value]:
        raise ValueError(f"task {run.task!r} takes no {wrong[0]} but {plain[wrong[0]]!r}: its rows are places")
    if run.simulation.engine != "process":
        raise ValueError(f"task {run.task!r} is simulated in this process: leave simulation.engine at 'process'")


@_rule
def _examples_are_images_with_places(run: "RunConfig") -> None:
    if run.simulation.examples and run.task not in DENSE_LAYERS:
        raise ValueError(
            f"simulation.examples draws masks or boxes on images, which task {run.task!r} does not predict"
        )


@_rule
def _language_models_train_adapters(run: "RunConfig") -> None:
    if run.task != GENERATION:
        return
    if not run.backbone.startswith("hf:"):
        raise ValueError(
            f"task 'generation' needs a causal language model, as in --backbone hf:NAME, not {run.backbone!r}"
        )
    if run.tune.schedule or (run.tune.layers and parse_tune(run.tune.layers).method != "lora"):
        raise ValueError(f"task 'generation' trains adapters, as in tune = 'lora:8', not {run.tune.layers!r}")
    plain: dict[str, Any] = {
        "layer": ("penultimate", NEXT_TOKEN),
        "head": ("linear", "none"),
        "init": ("", "zeros"),
        "classes": ((), GENERATION_COLUMNS),
        "classes_from": ("",),
        "pooling": ("sum",),
        "worth": (False,),
        "adapt": (False,),
    }
    if wrong := [name for name, values in plain.items() if getattr(run, name) not in values]:
        raise ValueError(f"task 'generation' takes no {wrong[0]}: it has neither head nor classes")


@_rule
def _words_have_no_foreign_test(run: "RunConfig") -> None:
    if run.task == "tagging" and run.foreign:
        raise ValueError("foreign is about whole inputs, and task 'tagging' is about words: leave it out")


@_rule
def _one_source_of_classes(run: "RunConfig") -> None:
    if run.classes and run.classes_from:
        raise ValueError("give classes or classes_from, not both")


@_rule
def _private_runs_solve_sums(run: "RunConfig") -> None:
    if not run.privacy.on:
        return
    if run.task != "classification":
        raise ValueError(f"differential privacy (epsilon) needs the task 'classification', not {run.task!r}")
    if run.head not in ("linear", "unit"):
        raise ValueError(f"differential privacy (epsilon) needs a linear head, not {run.head!r}")
    if run.basis != "none" or run.lift != "none":
        raise ValueError("differential privacy (epsilon) has a basis of its own: set basis and lift to 'none'")


@_rule
def _settings_of_tuning_name_layers(run: "RunConfig") -> None:
    # A language model's run trains adapters without being told.
    if run.tune.on or run.task == GENERATION:
        return
    plain = TuneConfig(layers=run.tune.layers, schedule=run.tune.schedule)
    if changed := [name for name in TuneConfig.model_fields if getattr(run.tune, name) != getattr(plain, name)]:
        raise ValueError(f"the setting tune.{changed[0]} needs layers to tune, as in tune.layers = 'last:1'")


@_rule
def _objectives_train_layers(run: "RunConfig") -> None:
    objective = run.tune.objective
    if objective == "task":
        return
    if run.task == GENERATION:
        raise ValueError(f"task {GENERATION!r} trains on answers: leave tune.objective out, not {objective!r}")
    if objective == "supcon" and run.task != "classification":
        raise ValueError(f"objective 'supcon' compares rows of one class each, which task {run.task!r} does not have")
    if objective == "supcon" and run.tune.batch_size == 1:
        raise ValueError("objective 'supcon' compares the rows of a minibatch: set tune.batch_size to 2 or more")
    if objective == "mlm" and not run.backbone.startswith("hf:"):
        raise ValueError(f"objective 'mlm' masks words for a text encoder hf:NAME, not for {run.backbone!r}")
    if objective == "mlm" and run.simulation.activations == "recompute":
        raise ValueError("objective 'mlm' needs stored activations: set simulation.activations to 'auto' or 'store'")
    if "head" in run.tune.schedule.values():
        raise ValueError(
            f"in a schedule's stage 'head' no layers train, so that objective {objective!r} has none: begin with "
            'layers, as in { 1 = "last:1" }'
        )


@_rule
def _adapters_that_stay_at_sites_are_of_classifiers(run: "RunConfig") -> None:
    if not run.tune.on or not parse_tune(run.tune.layers).personal:
        return
    if run.task != "classification":
        raise ValueError(f"adapters that stay at sites ('lora:8:sa') are for task 'classification', not {run.task!r}")
    if run.tune.schedule:
        raise ValueError("adapters that stay at sites ('lora:8:sa') train from the first round: leave schedule out")
    if run.tune.objective != "task":
        raise ValueError(
            f"adapters that stay at sites ('lora:8:sa') train on the task: leave objective {run.tune.objective!r} out"
        )


@_rule
def _tuned_runs_start_from_a_solved_head(run: "RunConfig") -> None:
    if not run.tune.on:
        return
    if run.rounds == 0:
        raise ValueError(f"tune = {run.tune.layers!r} trains in rounds: set rounds to 1 or more")
    if (last := max(run.tune.schedule, default=1)) > run.rounds:
        raise ValueError(
            f"the last stage of tune.schedule begins in round {last}: set rounds to {last} or more, not {run.rounds}"
        )
    if run.privacy.on:
        raise ValueError(
            "differential privacy (epsilon) covers the head of one exchange only, not tuned layers: leave tune out"
        )
    if run.task not in ("classification", "multi-label", GENERATION):
        raise ValueError(f"tune is for the tasks 'classification' and 'multi-label', not {run.task!r}")
    solved = run.head == "linear" and run.init not in ("zeros", "random")
    if run.task != GENERATION and not solved:
        raise ValueError("tune starts from a solved head: set head to 'linear', and init to 'lda' or leave it out")
    plain: dict[str, Any] = {"basis": "none", "lift": "none", "personal": "none", "foreign": False}
    if wrong := [name for name, value in plain.items() if getattr(run, name) != value]:
        raise ValueError(f"{wrong[0]} is computed from the features of the frozen backbone: leave it or tune out")
    if run.strategy.name == "pooled-lbfgs":
        raise ValueError("pooled-lbfgs trains a linear head alone: leave tune out, or take 'FedAvg'")
    if run.simulation.engine != "process":
        raise ValueError("tune is simulated in this process: leave simulation.engine at 'process'")
    if run.local != LocalConfig(proximal_mu=run.local.proximal_mu):
        raise ValueError("a tuned run trains by the settings of its table tune, as in tune.lr: leave local out")
