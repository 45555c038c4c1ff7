"""Teaching: losses, the train step, its state, and the run around them (paper section 3)."""
