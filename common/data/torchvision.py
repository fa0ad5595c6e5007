"""`torchvision:DATASET`: the classification data sets that torchvision knows, from where they lie."""

import ast
import hashlib
import inspect
from pathlib import Path
from typing import Any

from fedhead.data.python import Pairs, samples_of_pairs
from fedhead.data.samples import Samples, index_labels, sources, split_options
from fedhead.errors import UserError
from fedhead.registry import suggest


@sources.register("torchvision")
def load_torchvision(argument: str) -> Samples:
    """A data set of torchvision's, as in `torchvision:MNIST?root=data`, downloaded only if `download=yes` is said.

    Options are the data set's own arguments. `split` chooses a part where it has parts, by `train=` or by a name
    (`split`, `subset` or what the data set calls it); without it the data set's own default is taken.
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
        arguments["root"] = str(Path(str(arguments["root"])).expanduser().absolute())
    elif "root" in parameters and parameters["root"].default is inspect.Parameter.empty:
        raise UserError(f"torchvision's {name} needs the folder it lies in, as in torchvision:{name}?root=data.")
    try:
        dataset = build(**arguments)
        len(dataset)
    except UserError:
        raise
    # Every data set raises in its own way where files are missing or arguments do not fit.
    except Exception as error:
        missing = "download" in parameters and not arguments.get("download")
        advice = f" If it is not there yet: '{spec}{'&' if options else '?'}download=yes'." if missing else ""
        raise UserError(f"torchvision's {name} cannot be loaded: {_first_line(error)}.{advice}") from None
    kept = "&".join(f"{key}={value}" for key, value in {**options, **_root(arguments)}.items() if key != "download")
    whole = f"torchvision:{name}{f'?{kept}' if kept else ''}"
    return _samples(dataset, arguments, whole)


def _arguments(options: dict[str, str], parameters: Any, name: str) -> dict[str, Any]:
    """Return options as the data set's arguments: Python literals, or else text."""
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
    """Take labels from where the data set keeps them; one that keeps none, or no files, is read through once."""
    labels = next(
        (found for key in ("targets", "labels", "_labels") if _fits(found := getattr(dataset, key, None), dataset)),
        None,
    )
    root = Path(str(arguments.get("root", "")))
    if labels is None or "root" not in arguments or not root.is_dir():
        return samples_of_pairs(dataset, spec)
    digest = hashlib.sha256(repr((spec, str(labels))).encode())
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    rows = Pairs(dataset, spec)
    classes, indices = index_labels([int(label) for label in labels], getattr(dataset, "classes", None), spec)
    digest.update(indices.tobytes())
    return Samples(
        spec=spec, classes=classes, labels=indices, read=rows.read, name=rows.name, fingerprint=digest.hexdigest()
    )


def _fits(labels: Any, dataset: Any) -> bool:
    """Tell whether labels are one class number for each row."""
    if labels is None or not hasattr(labels, "__len__") or len(labels) != len(dataset) or len(labels) == 0:
        return False
    try:
        return bool(int(labels[0]) == labels[0])
    except (TypeError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
