"""Objectives, guidance and samplers; all independent of the network."""
