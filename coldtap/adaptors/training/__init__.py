"""From an adaptor and its options to a trained run."""
