"""Encoders of sound from the hub: Whisper, the wav2vec 2.0 family and AST, with their libraries' feature extractors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fedhead.backbones.audio import MAX_SECONDS, RATE, SHORTEST, AudioPreprocessing, Waveform
from fedhead.backbones.pooling import Sequences
from fedhead.data.sounds import LONGEST
from fedhead.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Form = Literal["mel", "waveform", "image"]
"""Input of an encoder: a spectrogram of free length, samples, or a spectrogram of one size."""

FORMS: dict[str, Form] = {
    "whisper": "mel",
    **dict.fromkeys(
        ("data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2", "wavlm"),
        "waveform",
    ),
    "audio-spectrogram-transformer": "image",
}
"""Supported architectures."""

EXTRACTORS: dict[Form, str] = {
    "mel": "WhisperFeatureExtractor",
    "waveform": "Wav2Vec2FeatureExtractor",
    "image": "ASTFeatureExtractor",
}

LEAST_SECONDS = 2
"""Duration to which Whisper's inputs are padded at least: with one second, the spoken digits of some speakers are
recognised less well."""

INPUTS = ("input_features", "input_values")
"""Main inputs of models of sound in transformers."""

_COUNTS = {
    "sampling_rate": (4_000, 96_000),
    "feature_size": (1, 512),
    "num_mel_bins": (1, 512),
    "hop_length": (16, 4_096),
    "n_fft": (64, 8_192),
    "chunk_length": (1, 600),
    "max_length": (16, 65_536),
}
"""Limits of an extractor's whole numbers; all its settings may come from a file of a coordinator."""

_NUMBERS = {"padding_value": (-1e4, 1e4), "mean": (-1e4, 1e4), "std": (1e-3, 1e4), "dither": (0.0, 0.0)}
"""Limits of its other numbers."""

_FLAGS = ("do_normalize", "return_attention_mask")

_SETTINGS: dict[str, tuple[str, ...]] = {
    "WhisperFeatureExtractor": ("hop_length", "chunk_length", "n_fft", "dither"),
    "Wav2Vec2FeatureExtractor": ("do_normalize",),
    "ASTFeatureExtractor": ("num_mel_bins", "max_length", "mean", "std", "do_normalize"),
}
"""Settings of each extractor, beside those of all; it gets no others."""

_SHARED = ("sampling_rate", "feature_size", "padding_value", "padding_side", "return_attention_mask")

_MOST_SAMPLES = 600 * RATE
"""Longest input of a model, padding included: 38 MB."""


def audio_arguments(folder: Path, config: "PreTrainedConfig", spec: str) -> dict[str, Any]:
    """Return the name and the settings of a folder's feature extractor.

    Raises:
        UserError: if it is missing, or not the architecture's own.
    """
    from transformers import AutoFeatureExtractor

    wanted = EXTRACTORS[form_of(config, spec)]
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # Extractors validate themselves and may raise any error.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The feature extractor of {spec} cannot be read from {folder}/preprocessor_config.json: {reason}."
        ) from None
    if type(extractor).__name__ != wanted:
        raise UserError(f"{spec} prepares sounds with {type(extractor).__name__}; fedhead supports {wanted} for it.")
    settings = {name: value for name, value in extractor.to_dict().items() if name in (*_SHARED, *_SETTINGS[wanted])}
    # Random noise would make features differ from one extraction to the next.
    settings |= {"dither": 0.0} if "dither" in settings else {}
    try:
        return checked_audio({"extractor": wanted, "settings": settings})
    except ValueError as error:
        raise UserError(f"{folder}/preprocessor_config.json cannot be used: {error}.") from None


def checked_audio(audio: Any) -> dict[str, Any]:
    """Return the name and the settings of a feature extractor, without any other value.

    Raises:
        ValueError: if the name or a setting is unknown, or a setting is out of bounds.
    """
    name, settings = audio["extractor"], audio["settings"]
    if name not in _SETTINGS or not isinstance(settings, dict):
        raise ValueError(f"its feature extractor {str(name)[:60]!r} is not supported")
    allowed = (*_SHARED, *_SETTINGS[name])
    for key, value in settings.items():
        if key not in allowed:
            raise ValueError(f"its feature extractor has an unknown setting {str(key)[:60]!r}")
        _check_setting(key, value)
    rate = settings.get("sampling_rate", RATE)
    if settings.get("hop_length", 1) > rate:
        raise ValueError(f"its hop_length is {settings['hop_length']}, longer than a second of {rate} samples")
    if settings.get("chunk_length", 1) * rate > _MOST_SAMPLES:
        raise ValueError(f"its chunk_length is {settings['chunk_length']}: more than {_MOST_SAMPLES} samples")
    return {"extractor": name, "settings": settings}


def _check_setting(key: str, value: Any) -> None:
    """Check a setting's type and range.

    Raises:
        ValueError: if an extractor may not have it.
    """
    if key == "dither" and value:
        raise ValueError("its feature extractor adds noise")
    if key in _FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"its {key} is {str(value)[:60]}; expected true or false")
        return
    if key == "padding_side":
        if value != "right":
            raise ValueError(f"its padding_side is {str(value)[:60]}; expected right")
        return
    least, most = _COUNTS.get(key) or _NUMBERS[key]
    kinds = (int,) if key in _COUNTS else (int, float)
    # Comparison with NaN is false.
    if type(value) not in kinds or not least <= value <= most:
        raise ValueError(f"its {key} is {str(value)[:60]}; expected {least:g} to {most:g}")


def form_of(config: "PreTrainedConfig", spec: str) -> Form:
    """Return the form of a model's input.

    Raises:
        UserError: if the architecture is not supported.
    """
    if config.model_type not in FORMS:
        raise UserError(
            f"{spec} is a model of sound of the architecture {config.model_type}; fedhead supports "
            f"{', '.join(sorted(FORMS))}."
        )
    return FORMS[config.model_type]


def limit_of(audio: Mapping[str, Any], config: "PreTrainedConfig") -> float:
    """Return the longest clip that a model takes, in seconds."""
    settings = audio["settings"]
    if audio["extractor"] == EXTRACTORS["mel"]:
        return float(2 * config.max_source_positions * settings["hop_length"] / settings["sampling_rate"])
    if audio["extractor"] == EXTRACTORS["image"]:
        # Kaldi's frames begin every 10 ms.
        return float(settings["max_length"] / 100)
    return float(LONGEST)


def audio_preprocessing(audio: Mapping[str, Any], config: "PreTrainedConfig") -> AudioPreprocessing:
    """Build the preprocessing of a model.

    Args:
        audio: `extractor` and `settings` from `audio_arguments`; perhaps `max_seconds`, and `cut` False for inputs that
            are always padded to the model's limit.
        config: the architecture.
    """
    import transformers

    name, settings = audio["extractor"], audio["settings"]
    extractor = getattr(transformers, name)(**settings)
    rate, limit = int(extractor.sampling_rate), limit_of(audio, config)
    if name == EXTRACTORS["mel"] and 2 * config.max_source_positions * extractor.hop_length > _MOST_SAMPLES:
        raise UserError(
            f"The model takes {config.max_source_positions} positions, which amount to more than {_MOST_SAMPLES} "
            "samples."
        )

    def mel(waveform: Waveform) -> Tensor:
        hop = extractor.hop_length
        frames, second = -(-len(waveform) // hop), rate // hop
        most = 2 * config.max_source_positions
        padded = min(max(-(-frames // second), LEAST_SECONDS) * second, most) if audio.get("cut", True) else most
        made = extractor(waveform, sampling_rate=rate, max_length=padded * hop)
        return _marked(torch.as_tensor(made["input_features"][0]).T, frames)

    def samples(waveform: Waveform) -> Tensor:
        return torch.as_tensor(extractor(waveform, sampling_rate=rate, return_tensors="np")["input_values"][0])

    def image(waveform: Waveform) -> Tensor:
        frames = torch.as_tensor(extractor(waveform, sampling_rate=rate, return_tensors="np")["input_values"][0])
        return _marked(frames, len(frames))

    extract = {"WhisperFeatureExtractor": mel, "Wav2Vec2FeatureExtractor": samples}.get(name, image)
    return AudioPreprocessing(
        rate=rate,
        settings={
            "extractor": name,
            "settings": settings,
            "cut": audio.get("cut", True),
            "least_seconds": LEAST_SECONDS,
        },
        extract=extract,
        max_seconds=audio.get("max_seconds") or min(MAX_SECONDS, limit),
    )


def _marked(frames: Tensor, real: int) -> Tensor:
    """Add a column that is 1 for the first `real` of the frames `[length, values]`."""
    marks = (torch.arange(len(frames)) < real).to(torch.float32).unsqueeze(1)
    return torch.cat([frames.to(torch.float32), marks], dim=1)


class AudioEncoder(nn.Module):
    """A model of sound that returns one of its hidden states, or its own vector from the last one.

    Clips of one length go through the model together, and those of another length apart: padding would change the
    features of models that normalise over time or attend to silence. So a clip's features do not depend on its batch.

    Args:
        model: the library's model; of Whisper, the encoder.
        form: of its input.
        pooled: whether to return the model's own vector.
        hidden: the hidden state to return; None for the last one, after the model's final layers.
    """

    def __init__(self, model: "PreTrainedModel", form: Form, pooled: bool, hidden: int | None) -> None:
        super().__init__()
        self.model = model
        self.form = form
        self.pooled = pooled
        self.hidden = hidden

    def forward(self, clips: Tensor, lengths: Tensor | None = None) -> Tensor | Sequences:
        """Return vectors `[n, d]`, or hidden states with a mask.

        Args:
            clips: `[n, longest]` samples, or `[n, longest, values + 1]` frames with a mark.
            lengths: `[n]`, without the padding of the batch; None for clips of one length.
        """
        if lengths is None:
            return self._of_one_length(clips)
        groups = [torch.nonzero(lengths == length).flatten() for length in torch.unique(lengths)]
        outputs = [self._of_one_length(clips[rows, : int(lengths[rows[0]])]) for rows in groups]
        order = torch.cat(groups).argsort()
        if isinstance(outputs[0], Tensor):
            return torch.cat([one for one in outputs if isinstance(one, Tensor)])[order]
        parts = [one for one in outputs if isinstance(one, Sequences)]
        longest = max(one.values.shape[1] for one in parts)
        values = [nn.functional.pad(one.values, (0, 0, 0, longest - one.values.shape[1])) for one in parts]
        masks = [nn.functional.pad(one.mask, (0, longest - one.mask.shape[1])) for one in parts]
        return Sequences(torch.cat(values)[order], torch.cat(masks)[order])

    def _of_one_length(self, clips: Tensor) -> Tensor | Sequences:
        if self.form == "mel":
            return self._whisper(clips[..., :-1], clips[..., -1])
        given = clips if self.form == "waveform" else clips[..., :-1]
        output = self.model(given, return_dict=True, output_hidden_states=self.hidden is not None)
        if self.pooled:
            vectors: Tensor = output.pooler_output
            return vectors
        states: Tensor = output.last_hidden_state if self.hidden is None else output.hidden_states[self.hidden]
        return Sequences(states, torch.ones(states.shape[:2], dtype=torch.int64, device=states.device))

    def _whisper(self, frames: Tensor, marks: Tensor) -> Sequences:
        """Encode frames `[n, length, bands]` with as many positions as they need; the library always takes all."""
        encoder: Any = self.model
        states = nn.functional.gelu(encoder.conv1(frames.transpose(1, 2)))
        states = nn.functional.gelu(encoder.conv2(states)).transpose(1, 2)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        for number, block in enumerate(encoder.layers):
            if self.hidden == number:
                break
            output = block(states, None)
            states = output[0] if isinstance(output, tuple) else output
        if self.hidden is None:
            states = encoder.layer_norm(states)
        # A position covers two frames.
        return Sequences(states, marks[:, ::2].to(torch.int64))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)


def own_vector(config: "PreTrainedConfig") -> bool:
    """Return whether a model has its own pooling, as AST does."""
    return FORMS.get(config.model_type) == "image"


def max_seconds_of(value: str, spec: str) -> float:
    """Return a setting `max_seconds` as a number.

    Raises:
        UserError: if it is not a duration that clips can have.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not SHORTEST <= seconds <= LONGEST:
        raise UserError(f"The max_seconds of {spec} is a number from {SHORTEST} to {LONGEST}, not {value!r}.")
    return seconds
