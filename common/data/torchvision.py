"""`torchvision:DATASET`: the classification data sets of torchvision, from local files."""

import ast
import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedhead.data.files import stamp
from fedhead.data.labels import index_labels
from fedhead.data.python import Pairs, samples_of_pairs
from fedhead.data.samples import Former, Samples, sources
from fedhead.data.specs import split_options, to_path
from fedhead.errors import UserError
from fedhead.registry import suggest


@sources.register("torchvision")
def load_torchvision(argument: str) -> Samples:
    """A data set of torchvision, as in `torchvision:MNIST?root=data`, downloaded only with `download=yes`.

    Options are the data set's own arguments. `split` chooses a split if there are any, by `train=` or by a name
    (`split`, `subset` or the data set's own argument); by default the data set's own default is used.
    """
    import torchvision.datasets

    spec = f"torchvision:{argument}"
    name, options = split_options(argument, (), spec)
    known = [
        one
        for one in torchvision.datasets.__all__
        if one not in ("DatasetFolder", "VisionDataset", "wrap_dataset_for_transforms_v2")
    ]
    if name not in known:
        raise UserError(f"torchvision has no data set {name!r}. {suggest(name, known)}")
    build = getattr(torchvision.datasets, name)
    parameters = inspect.signature(build).parameters
    arguments = _arguments(options, parameters, name)
    if "root" in arguments:
        arguments["root"] = str(to_path(str(arguments["root"])).absolute())
    elif "root" in parameters and parameters["root"].default is inspect.Parameter.empty:
        raise UserError(f"torchvision's {name} needs its folder, as in torchvision:{name}?root=data.")
    try:
        dataset = build(**arguments)
        len(dataset)
    except UserError:
        raise
    # Data sets raise various errors for missing files or invalid arguments.
    except Exception as error:
        missing = "download" in parameters and not arguments.get("download")
        advice = f" To download it: '{spec}{'&' if options else '?'}download=yes'." if missing else ""
        raise UserError(f"torchvision's {name} cannot be loaded: {_first_line(error)}.{advice}") from None
    kept = "&".join(f"{key}={value}" for key, value in {**options, **_root(arguments)}.items() if key != "download")
    whole = f"torchvision:{name}{f'?{kept}' if kept else ''}"
    return _samples(dataset, arguments, whole)


def _arguments(options: dict[str, str], parameters: Any, name: str) -> dict[str, Any]:
    """Return options as the data set's arguments: Python literals, or text."""
    arguments: dict[str, Any] = {}
    for option, text in options.items():
        if option == "split" and "split" not in parameters:
            if "train" not in parameters or text not in ("train", "test"):
                raise UserError(f"torchvision's {name} has no split {text!r} to choose.")
            arguments["train"] = text == "train"
        elif option not in parameters or option in ("transform", "target_transform", "transforms", "loader"):
            raise UserError(
                f"torchvision's {name} takes no option {option!r}. {suggest(option, [*parameters, 'split'])}"
            )
        else:
            arguments[option] = _literal(text)
    return arguments


def _literal(text: str) -> Any:
    if text.casefold() in ("yes", "no", "true", "false"):
        return text.casefold() in ("yes", "true")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _root(arguments: dict[str, Any]) -> dict[str, str]:
    return {"root": arguments["root"]} if "root" in arguments else {}


def _samples(dataset: Any, arguments: dict[str, Any], spec: str) -> Samples:
    """Read labels from the data set's attributes; a data set without labels or files there is read through once."""
    labels = next(
        (found for key in ("targets", "labels", "_labels") if _fits(found := getattr(dataset, key, None), dataset)),
        None,
    )
    root = Path(str(arguments.get("root", "")))
    if labels is None or "root" not in arguments or not root.is_dir():
        return samples_of_pairs(dataset, spec)
    rows = Pairs(dataset, spec)
    classes, indices = index_labels([int(label) for label in labels], getattr(dataset, "classes", None), spec)
    stamps = {path: stamp(path) for path in sorted(root.rglob("*"))}

    def fingerprint(stamped: Iterable[tuple[Path, str]]) -> str:
        digest = hashlib.sha256(repr((spec, str(labels))).encode(errors="surrogatepass"))
        for path, one in stamped:
            digest.update(f"{path}\0{one}\n".encode(errors="surrogateescape"))
        digest.update(indices.tobytes())
        return digest.hexdigest()

    before = fingerprint((path, one.former.replace(" ", "\0")) for path, one in stamps.items())
    return Samples(
        spec=spec,
        classes=classes,
        labels=indices,
        read=rows.read,
        name=rows.name,
        fingerprint=fingerprint((path, str(one)) for path, one in stamps.items()),
        former=Former(before, max((one.changed for one in stamps.values()), default=0)),
    )


def _fits(labels: Any, dataset: Any) -> bool:
    """Return whether labels are one class number per row."""
    if labels is None or not hasattr(labels, "__len__") or len(labels) != len(dataset) or len(labels) == 0:
        return False
    try:
        return bool(int(labels[0]) == labels[0])
    except (TypeError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
