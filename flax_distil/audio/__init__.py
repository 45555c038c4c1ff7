"""Hear: bytes → waveform (`load`) → log-mel on the accelerator (`log_mel`); noise (`noise`)."""
