"""Lossy passes within a budget: which choice at which place, measured on the user's own batches."""
