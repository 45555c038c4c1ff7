"""Audio states on disk: made once, made further after a kill, never another encoder's."""

import ml_dtypes
import numpy as np
import pytest

from flax_distil.data.audio_states import audio_states
from flax_distil.data.utterances import Utterance
from flax_distil.errors import InputError

SHAPE = (3, 4)


def clips(count: int) -> list[Utterance]:
    return [Utterance(str(n), np.full(1600, (n + 1) / 64, np.float32)) for n in range(count)]


class Encoder:
    """Writes each clip's first sample all over its states, and breaks after some calls."""

    def __init__(self, breaks_after: int = 99):
        self.calls, self.breaks_after = 0, breaks_after

    def __call__(self, waveforms):
        if self.calls == self.breaks_after:
            raise KeyboardInterrupt
        self.calls += 1
        return np.broadcast_to(waveforms[:, :1, None] / 32768, (len(waveforms), *SHAPE))


def test_every_clip_once_and_again_from_disk(tmp_path):
    kept = audio_states(tmp_path, clips(5), Encoder(), SHAPE, {"encoder": "a"}, batch_size=2)
    expected = np.arange(1, 6, dtype=np.float32) / 64
    assert kept.states.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kept.states[:, 2, 3].astype(np.float32), expected)
    np.testing.assert_allclose(kept.seconds, 0.1)
    again = Encoder(breaks_after=0)
    kept = audio_states(tmp_path, clips(5), again, SHAPE, {"encoder": "a"}, batch_size=2)
    np.testing.assert_array_equal(kept.states[:, 0, 0].astype(np.float32), expected)


def test_goes_on_after_a_kill(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        audio_states(tmp_path, clips(5), Encoder(2), SHAPE, {"encoder": "a"}, batch_size=2)
    rest = Encoder()
    kept = audio_states(tmp_path, clips(5), rest, SHAPE, {"encoder": "a"}, batch_size=2)
    assert rest.calls == 1
    np.testing.assert_array_equal(kept.states[:, 0, 0].astype(np.float32), np.arange(1, 6) / 64)


def test_another_encoder_is_refused(tmp_path):
    audio_states(tmp_path, clips(2), Encoder(), SHAPE, {"encoder": "a"})
    with pytest.raises(InputError, match="encoder differ"):
        audio_states(tmp_path, clips(2), Encoder(), SHAPE, {"encoder": "b"})


def test_a_clip_that_cannot_be_heard_has_no_seconds(tmp_path):
    utterances = [*clips(1), Utterance("bad", b"nothing")]
    kept = audio_states(tmp_path, utterances, Encoder(), SHAPE, {})
    np.testing.assert_allclose(kept.seconds, [0.1, 0])
