"""Hear: bytes → decoded track (`container`) → placed, mixed and resampled (`samples`) → waveform
(`load`) → log-mel on the accelerator (`log_mel`); noise (`noise`).
"""
