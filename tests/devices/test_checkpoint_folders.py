"""Odd checkpoint folders against transformers itself: the same tensors are read, or the folder is refused by name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from penstock.core.protocol.errors import CheckpointError, ConfigError
from penstock.plugins.weights.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Tensors]


def shards(folder: Path, whole: Tensors, files: tuple[str, ...], index: str = "model.safetensors.index.json", **table: str) -> None:
    """The tensors dealt out to files, and an index to them; `table` says otherwise where a tensor is ("__" stands for a dot)."""
    where = {name: files[at % len(files)] for at, name in enumerate(sorted(whole))}
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value for name, value in whole.items() if where[name] == file}, folder / file)
    where.update({name.replace("__", "."): file for name, file in table.items()})
    (folder / index).parent.mkdir(exist_ok=True)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def index_with_other_places(folder: Path, make: Make) -> None:
    (folder / "model.safetensors").unlink()
    shards(folder, make(), ("a.safetensors", "b.safetensors"), lm_head__weight="b.safetensors", model__norm__weight="b.safetensors")


def index_that_names_too_much(folder: Path, make: Make) -> None:
    (folder / "model.safetensors").unlink()
    shards(folder, make(), ("a.safetensors", "b.safetensors"), nowhere__weight="a.safetensors")


def old_shards_beside(folder: Path, make: Make) -> None:
    shards(folder, make(seed=1), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))


def old_shards_of_another_count(folder: Path, make: Make) -> None:
    (folder / "model.safetensors").unlink()
    shards(folder, make(seed=1), ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"))
    shards(folder, make(), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"))


def a_tensor_twice(folder: Path, make: Make) -> None:
    (folder / "model.safetensors").unlink()
    shards(folder, make(), ("a.safetensors", "b.safetensors"))
    save_file({**make(seed=1)}, folder / "a.safetensors")


def shards_below(folder: Path, make: Make) -> None:
    shards(folder, make(), ("part/a.safetensors", "part/b.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(make(seed=1), folder / "a.safetensors")


def consolidated_beside(folder: Path, make: Make) -> None:
    save_file(make(seed=1), folder / "consolidated.safetensors")


def adapter_beside(folder: Path, make: Make) -> None:
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, folder / "adapter_model.safetensors")


def variants_beside(folder: Path, make: Make) -> None:
    save_file(make(torch.float16, seed=1), folder / "model.fp16.safetensors")
    save_file(make(torch.bfloat16, seed=2), folder / "model.bf16.safetensors")


def pickle_beside(folder: Path, make: Make) -> None:
    torch.save(make(seed=1), folder / "pytorch_model.bin")


def links(folder: Path, make: Make) -> None:
    blobs = folder.parent / f"{folder.name}-blobs"
    blobs.mkdir(exist_ok=True)
    shards(folder, make(), ("a.safetensors", "b.safetensors"))
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors", "model.safetensors.index.json"):
        os.replace(folder / name, blobs / name)
        (folder / name).symlink_to(os.path.relpath(blobs / name, folder))


def a_link_to_nothing(folder: Path, make: Make) -> None:
    shards(folder, make(seed=1), ("a.safetensors", "b.safetensors"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")


def mixed_dtypes(folder: Path, make: Make) -> None:
    half = make(torch.bfloat16, seed=1)
    save_file({name: half[name] if "mlp" in name else value for name, value in make().items()}, folder / "model.safetensors")


def named_file(folder: Path, make: Make) -> None:
    save_file(make(seed=1), folder / "other.safetensors")
    configure(folder, transformers_weights="other.safetensors")


def named_file_below(folder: Path, make: Make) -> None:
    (folder / "part").mkdir()
    save_file(make(seed=1), folder / "part" / "model.safetensors")
    configure(folder, transformers_weights="part/model.safetensors")


def named_index(folder: Path, make: Make) -> None:
    shards(folder, make(seed=1), ("a.safetensors", "b.safetensors"), "other.safetensors.index.json")
    configure(folder, transformers_weights="other.safetensors.index.json")


def named_nothing(folder: Path, make: Make) -> None:
    save_file(make(seed=1), folder / "other.safetensors")
    configure(folder, transformers_weights=None)


ODD = [
    index_with_other_places, index_that_names_too_much, old_shards_beside, old_shards_of_another_count, a_tensor_twice, shards_below,
    consolidated_beside, adapter_beside, variants_beside, pickle_beside, links, a_link_to_nothing, mixed_dtypes, named_file,
    named_file_below, named_index, named_nothing,
]  # fmt: skip


@pytest.mark.parametrize("arrange", ODD, ids=lambda arrange: arrange.__name__)
def test_tensors_are_those_of_transformers(folder: Path, make_tensors: Make, arrange: Callable[[Path, Make], None]) -> None:
    arrange(folder, make_tensors)
    theirs = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).state_dict()
    mine = Checkpoint(folder, torch.float32)
    for name, value in theirs.items():
        assert torch.equal(mine.take(name, list(value.shape)), value), name
    mine.finish()


def test_a_shard_that_lacks_tensors_is_refused(folder: Path, make_tensors: Make) -> None:
    """transformers makes up what is missing, with a warning."""
    (folder / "model.safetensors").unlink()
    shards(folder, make_tensors(), ("a.safetensors", "b.safetensors"))
    save_file({"lm_head.weight": torch.zeros(97, 32)}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing"):
        Checkpoint(folder, torch.float32).take("model.norm.weight", [32])


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ("gone.safetensors", "does not exist"),
        ("../model.safetensors", "outside"),
        ("/etc/x.safetensors", "outside"),
        ("pytorch_model.bin", "must name a safetensors file"),
        (7, "must name a safetensors file"),
        (["a.safetensors"], "must name a safetensors file"),
    ],
)
def test_a_named_file_that_cannot_be_read_is_refused(folder: Path, named: Any, what: str) -> None:
    configure(folder, transformers_weights=named)
    with pytest.raises(CheckpointError, match=f"transformers_weights.*{what}") as error:
        Checkpoint(folder, torch.float32)
    assert error.value.param == "transformers_weights"
    with pytest.raises((ValueError, OSError, AttributeError, TypeError)):
        AutoModelForCausalLM.from_pretrained(str(folder))


def test_what_lies_unread_is_said(folder: Path, make_tensors: Make, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Checkpoint(folder, torch.float32)
        return caplog.text

    assert said() == ""
    named_index(folder, make_tensors)
    shards(folder, make_tensors(), ("c.safetensors",))
    assert "read from a.safetensors, b.safetensors; ignored: model.safetensors.index.json, c.safetensors, model.safetensors" in said()
    configure(folder, transformers_weights="model.safetensors.index.json")
    assert "read from c.safetensors; ignored: a.safetensors, b.safetensors, model.safetensors" in said()
    (folder / "adapter_config.json").write_text("{}")
    assert "the adapter that lies beside the weights is not applied" in said()


def test_a_file_of_the_same_name_below_hides_none(folder: Path, make_tensors: Make, caplog: pytest.LogCaptureFixture) -> None:
    shards_below(folder, make_tensors)
    Checkpoint(folder, torch.float32)
    assert "ignored: a.safetensors" in caplog.text


def test_a_named_file_is_served_but_not_by_an_override(folder: Path, load: Callable[..., Any], make_tensors: Make) -> None:
    plain = load(folder).fingerprint
    named_file(folder, make_tensors)
    assert load(folder).fingerprint != plain
    with pytest.raises(ConfigError, match="transformers_weights"):
        load(folder, hf_overrides={"transformers_weights": "model.safetensors"})
