"""Which folder or file is served, and under which name.

What it is: the one place that turns `--model` (or its absence: the demo model that comes with the package) into an absolute path and a served
name (and does the same for the models of drafters), before any process starts, so that all of them agree and a typing error is one clear line. The path is that of a Hugging Face folder, or of a
GGUF file, which may be given by the folder that holds it.
What it does not know: what is in config.json, what is in a GGUF file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec

from penstock.core.protocol.config import LINK_IT, Config
from penstock.core.protocol.errors import ConfigError, spelled
from penstock.core.protocol.model_files import GGUF
from penstock.core.protocol.speculation import encoded, parsed, resolved

DEMO_FOLDER = "demo_model/brook"
DEMO_NAME = "brook"


def demo_folder() -> Path:
    """The demo model's folder inside the installed package (it may be missing). Imports nothing."""
    spec = importlib.util.find_spec("penstock.plugins")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) / DEMO_FOLDER if places else Path(DEMO_FOLDER)


def _look(folder: Path) -> None:
    """Raises ConfigError for a folder that may not be looked into, or a config.json that may not be read."""
    try:
        if folder.is_dir():
            (folder / "config.json").stat()
            next(folder.iterdir(), None)
    except PermissionError:
        raise ConfigError(
            f"--model {spelled(str(folder))}: permission denied. Let the user that Penstock runs as read the folder, and those above it.",
            param="model",
        ) from None
    except OSError:  # it is said below what is missing
        pass


def _single(folder: Path) -> Path | None:
    """The GGUF file that a folder stands for: its only one, where no safetensors lie beside it. Raises ConfigError for several."""
    files = sorted(file for file in folder.glob("*" + GGUF) if file.is_file())
    if not files or next(folder.glob("*.safetensors"), None) is not None:
        return None
    if len(files) > 1:
        names = ", ".join(spelled(file.name) for file in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
        raise ConfigError(
            f"--model {spelled(str(folder))}: the folder holds several GGUF files ({names}). Name the one to serve.", param="model"
        )
    return files[0]


def with_model(config: Config) -> Config:
    """`config` with `model` as an absolute path and a first served name, and with everything of its drafters in `speculative_config`. Raises ConfigError."""
    if config.model is None:
        folder, name = demo_folder(), DEMO_NAME
        if not (folder / "config.json").is_file():
            raise ConfigError("This installation holds no demo model. Name a Hugging Face folder: penstock serve FOLDER.", param="model")
    else:
        folder = Path(config.model).expanduser().absolute()
        name = folder.name
        _look(folder)
        if folder.is_dir():
            file = _single(folder)
            if file is None and not (folder / "config.json").is_file():
                raise ConfigError(
                    f"--model {config.model}: the folder holds no config.json, so it is no Hugging Face checkpoint.", param="model"
                )
            folder = file or folder
        elif folder.is_file() and folder.suffix == GGUF:
            name = folder.stem
        elif folder.is_file():
            raise ConfigError(
                f"--model {config.model}: a file, and none whose name ends in {GGUF}. Give the path of a Hugging Face folder or of a GGUF file.",
                param="model",
            )
        else:
            what = "file" if folder.suffix == GGUF else "folder"
            raise ConfigError(
                f"--model {config.model}: there is no such {what}. Penstock downloads nothing: give the path of a Hugging Face checkpoint, or of a"
                " GGUF file.",
                param="model",
            )
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # a folder above it, or the name of the working directory
        raise ConfigError(f"The model's path '{spelled(str(folder))}' is not valid UTF-8. {LINK_IT}", param="model") from None
    config = msgspec.structs.replace(config, model=str(folder), served_model_name=config.served_model_name or [name])
    asked = parsed(config.speculative_config, config.speculative_model, config.num_speculative_tokens)
    if asked is None:
        return config
    found = resolved(asked, demo_folder().parent)
    return msgspec.structs.replace(config, speculative_config=encoded(found), speculative_model=None, num_speculative_tokens=None)
