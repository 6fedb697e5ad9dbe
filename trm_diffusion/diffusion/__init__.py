"""Objectives, guidance and samplers; none of them knows what network it works with."""
