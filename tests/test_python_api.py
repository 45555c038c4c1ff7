"""The examples of docs/api.md are executed, with a small random model."""

import re
from pathlib import Path

import flax_distil
from flax_distil.audio.load import encode_flac
from flax_distil.export.verify import synthetic_clip

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_examples_run_and_use_every_name(random_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Random text would be drawn again at all temperatures.
    monkeypatch.setattr("flax_distil.transcription.sequential.needs_fallback", lambda *_: False)
    (tmp_path / "talk.flac").write_bytes(encode_flac(synthetic_clip()[:32_000]))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("whisper-tiny.en", str(random_folders[0])), names)
    assert set(flax_distil.__all__) <= set(names)
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert "missing.flac" in capsys.readouterr().out
