"""Audio: bytes → decoded track (`container`) → mono at 16 kHz (`samples`) → waveform (`load`) →
log-mel on the accelerator (`log_mel`); additive noise (`noise`).
"""

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 30 * SAMPLE_RATE  # 480,000: the window Whisper was trained on
