"""Noise in, noise out: objectives, guidance and samplers, all blind to the network they serve."""
