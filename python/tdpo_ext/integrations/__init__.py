"""Seams into trainers that people already use. Nothing here is imported by ``tdpo_ext`` itself."""
