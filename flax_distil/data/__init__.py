"""Data: any dataset → `utterances` → decoded `windows` → training `batches` → `loader`."""
