"""The Whisper model: its sizes, its maths, its weights in every published format, its students."""
