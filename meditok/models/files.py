"""Models on disk: a safetensors file whose header holds the description, or a directory around one.

Nothing here unpickles; `meditok convert` turns published checkpoints into this form.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..atomic import atomic_path, write_text
from ..errors import BadInputError, MissingPartError, UnsafeFileError, UsageError
from .config import TokenizerConfig, preset
from .precision import check_precision
from .tokenizer import Tokenizer

FORMAT = 1
WEIGHTS_FILE, CONFIG_FILE, PROCESSOR_FILE = "model.safetensors", "config.json", "preprocessor_config.json"
DATA_FILE = "data.json"  # what a model was trained on; its `files` are fingerprints, see evaluate.held_out
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit, checked here before anything is allocated
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # org/name, as the Hugging Face hub allows them
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle")


@torch.inference_mode(False)  # weights made inside a caller's inference mode could never be trained or hashed
def build(name: str = "vitamin-large", *, seed: int | None = None, **changes) -> Tokenizer:
    """A preset with random weights, in eval mode on the CPU; `changes` replace fields of its TokenizerConfig.

    With `seed` the weights are the same every time and the caller's random state is left alone.
    """
    config = preset(name, **changes)
    if seed is None:
        return Tokenizer(config).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tokenizer(config).eval()


@torch.inference_mode(False)
def load(
    name: str | os.PathLike = "tiny", *, device: str | torch.device = "auto", precision: str = "fp32"
) -> Tokenizer:
    """A tokenizer in eval mode.

    name: a bundled preset ("tiny"), a directory written by save_pretrained, a .safetensors file, or
    "hf://org/name@revision" (extra `hub`). device "auto" takes a GPU where there is one.
    MissingPartError: not there, or the device lacks the precision; UnsafeFileError: a pickle, or a header that claims
    more than the file holds; BadInputError: damaged, or weights that do not fit the description.
    """
    target = pick_device(device)
    check_precision(precision, target)
    model = read_model(weights_path(str(name)))
    model.precision = precision
    return model.to(target).eval()


def pick_device(device: str | torch.device) -> torch.device:
    """torch.device of "auto", "cpu", "cuda", "cuda:1", ...; MissingPartError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r}: unknown; use auto, cpu, cuda or cuda:N") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise MissingPartError(
            f"device {device!r}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return target


@torch.inference_mode(False)
def from_pretrained(name, *, revision: str | None = None, local_files_only: bool = False, device="auto") -> Tokenizer:
    """See Tokenizer.from_pretrained."""
    if Path(name).exists():
        return load(name, device=device)
    if not _REPOSITORY.fullmatch(str(name)):
        raise MissingPartError(
            f"model {str(name)!r}: no such directory, and no repository's name (org/name) either; correct it"
        )
    return read_model(_download(str(name), revision, local_files_only)).to(pick_device(device)).eval()


def bundled() -> dict[str, Path]:
    """Weights that came with the package: model name to safetensors file."""
    root = Path(__file__).parents[1] / "weights"  # importlib.resources looks beside the core of an editable install
    return {path.parent.name: path for path in sorted(root.glob(f"*/{WEIGHTS_FILE}"))}


def weights_path(name: str) -> Path:
    """Path of the safetensors file that `name` stands for."""
    if name.startswith("hf://"):
        repository, _, revision = name.removeprefix("hf://").partition("@")
        return _download(repository, revision or None, local_files_only=False)
    if name in bundled():
        return bundled()[name]
    path = Path(name)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if path.is_file():
        return path
    raise MissingPartError(
        f"model {name!r}: neither a bundled model ({', '.join(bundled())}) nor a directory with {WEIGHTS_FILE} nor a "
        ".safetensors file; published checkpoints come in through `meditok convert`"
    )


def data_record(name: str | os.PathLike) -> dict:
    """What the model of that name says it was trained on: data.json beside its weights, {} where there is none.

    BadInputError: it cannot be read.
    """
    path = weights_path(str(name)).parent / DATA_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise BadInputError(f"{path}: not a JSON object, so what the model has seen is unknown; repair or remove it")
    return record


def _download(repository: str, revision: str | None, local_files_only: bool) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise MissingPartError(f"model hf://{repository}: needs huggingface_hub; pip install 'meditok[hub]'") from None
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, WEIGHTS_FILE, revision=revision, local_files_only=local_files_only))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise MissingPartError(
            f"model hf://{repository}: {WEIGHTS_FILE} could not be fetched ({reason}); "
            "check name, revision and network, or give a local directory"
        ) from None


def read_model(path: Path) -> Tokenizer:
    """The tokenizer stored in a safetensors file, on the CPU, float32. Errors as in load."""
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            description = (file.metadata() or {}).get("meditok")
            if description is None:
                raise BadInputError(
                    f"{path}: no meditok description in its header; make it with `meditok convert` or save_pretrained"
                )
            config = parse_description(description, path)
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise BadInputError(f"{path}: damaged safetensors file ({error}); copy or convert it again") from None
    return model_from_state(config, state, str(path))


def check_safetensors(path: Path) -> None:
    """Refuse pickles and headers that claim more than the file holds, before anything is read or allocated."""
    if path.suffix.lower() in _PICKLES:
        raise UnsafeFileError(
            f"{path}: pickled checkpoints may run code and are not loaded; "
            f"run `meditok convert {path.name} {path.stem}.safetensors` first"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, MAX_HEADER_BYTES):
        raise UnsafeFileError(
            f"{path}: header of {header} bytes claimed in a file of {size}; not a whole safetensors file, "
            "copy it again, or run `meditok convert` on the original"
        )


def parse_description(text: str, path) -> TokenizerConfig:
    """The config in a header's description; BadInputError for another format version."""
    try:
        values = json.loads(text)
        version, config = values["format"], values["config"]
    except (ValueError, KeyError, TypeError):
        raise BadInputError(f"{path}: unreadable meditok description in its header; convert it again") from None
    if version != FORMAT:
        raise BadInputError(
            f"{path}: format {version}, this meditok reads format {FORMAT}; upgrade meditok or convert again"
        )
    return TokenizerConfig.from_dict(config)


def model_from_state(config: TokenizerConfig, state: dict[str, torch.Tensor], where: str) -> Tokenizer:
    """A tokenizer holding exactly `state`; BadInputError lists what is missing, unexpected or of another shape."""
    # Large models start on the meta device, so that no random weights are drawn only to be replaced; small ones do
    # not, since meta tensors import torch's symbolic algebra, which takes longer than drawing them.
    with torch.device("meta" if config.width > 256 else "cpu"):
        model = Tokenizer(config)
    model = model.to_empty(device="cpu")
    problems = misfits({key: value.shape for key, value in model.state_dict().items()}, state)
    if problems:
        raise BadInputError(f"{where}: weights do not fit {config.name}: " + abridged(problems))
    model.load_state_dict(state)
    return model


def misfits(expected: dict[str, torch.Size], state: dict[str, torch.Tensor]) -> list[str]:
    """What keeps `state` from filling tensors of the `expected` shapes: missing, unexpected and misshapen ones."""
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    return problems + [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]


def abridged(lines: Iterable[str], limit: int = 8) -> str:
    """At most `limit` entries in one line, and how many more there are."""
    lines = list(lines)
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


def write_model(model: Tokenizer, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> Path:
    """Write weights and description to a safetensors file, atomically; dtype float32, or float16 for half the bytes."""
    description = json.dumps({"format": FORMAT, "config": model.config.to_dict()}, sort_keys=True)
    state = {
        key: value.detach().cpu().to(dtype).contiguous().clone()
        for key, value in model.state_dict().items()
        if not key.startswith("quantizer.state.")  # training state belongs to checkpoints, not to models
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"meditok": description, "format": "pt"})
    return path


def save_pretrained(model: Tokenizer, directory: str | os.PathLike) -> None:
    """See Tokenizer.save_pretrained."""
    directory = Path(directory)
    config = model.config
    write_model(model, directory / WEIGHTS_FILE)
    card = (
        f"---\nlicense: other\nlicense_name: {config.licence}\ntags: [meditok, medical-imaging, tokenizer]\n---\n"
        f"# {config.name}\n\nA MedITok tokenizer: {config.num_codebooks} codebooks of {config.codebook_size} codes, "
        f'{config.image_size} px; {config.intended_use}. Load it with `meditok.load("{directory.name}")`.\n\n'
        f"Model hash {model.hash}, codebook hash {model.codebook_hash}.\n"
    )
    write_text(directory / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")
    write_text(directory / PROCESSOR_FILE, json.dumps(model.processor.to_dict(), indent=2) + "\n")
    write_text(directory / "README.md", card)
