"""Several datasets in one run: a store each, labelled by a teacher that is loaded once."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
from fake_teacher import clip

from flax_distil.cli import main
from flax_distil.config import DataConfig, PseudoLabelConfig
from flax_distil.errors import InputError
from flax_distil.pseudo_label.jobs import by_dataset
from flax_distil.recipe import load_recipe, save_recipe


@pytest.fixture
def recipe(speech, tmp_path, random_folders):
    """Two clips of a manifest, and one of another."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.flac").write_bytes(clip(3))
    row = {"audio": "one.flac", "text": "Clip", "language": "en"}
    (tmp_path / "other" / "more clips.jsonl").write_text(json.dumps(row))
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
[pseudo-label]
model = "{random_folders[1]}"
output_dir = "{tmp_path}/labels"
max_tokens = 2
batch_size = 2
[[pseudo-label.data]]
source = "{speech}/manifest.jsonl"
limit = 2
[[pseudo-label.data]]
source = "{tmp_path}/other/more clips.jsonl"
""")
    return path


def test_each_dataset_has_a_store(recipe, tmp_path, capsys):
    assert main(["pseudo-label", "--recipe", str(recipe)]) == 0
    assert "2 datasets" in capsys.readouterr().out
    stores = {path.parent.name: path for path in (tmp_path / "labels").glob("*/labels.json")}
    assert sorted(stores) == ["manifest", "more-clips"]
    for name, labels in (("manifest", 2), ("more-clips", 1)):
        found = pq.read_table(stores[name].parent / "data")
        assert len(found) == labels
        assert "datasets" not in json.loads(stores[name].read_text())
    assert main(["pseudo-label", "--recipe", str(recipe), "--limit", "1"]) == 2
    assert "names 2 datasets, and flags change only the first" in capsys.readouterr().err


def test_a_recipe_with_several_is_written_as_it_was_read(recipe, tmp_path):
    config = load_recipe(recipe, PseudoLabelConfig)
    save_recipe(config, tmp_path / "again.toml")
    assert load_recipe(tmp_path / "again.toml", PseudoLabelConfig) == config


def test_stores_are_named_by_what_tells_datasets_apart(config):
    sets = [DataConfig("openslr/libri speech", "clean", split) for split in ("train.100", "test")]
    several = dataclasses.replace(config, data=sets[0], datasets=tuple(sets))
    names = [
        one.output_dir.relative_to(config.output_dir).as_posix() for one in by_dataset(several)
    ]
    assert names == ["libri-speech-clean-train.100", "libri-speech-clean-test"]
    assert by_dataset(config) == [config]
    twice = (DataConfig("a.jsonl"), DataConfig("b/a.jsonl"))
    several = dataclasses.replace(config, data=twice[0], datasets=twice)
    with pytest.raises(InputError, match="two datasets are called a: label one of them separately"):
        by_dataset(several)
