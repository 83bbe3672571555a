"""Proof of a trainer that memfit did not build: a user's own transformers or TRL Trainer, looked at and left alone."""
