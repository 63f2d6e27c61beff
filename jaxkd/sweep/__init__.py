"""Sweeps: many runs in one device call (`engine`) and their labelled results on disk (`store`)."""
