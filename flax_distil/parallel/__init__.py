"""The ground all else stands on: device mesh and shardings, kept out of the model."""
