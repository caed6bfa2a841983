"""A finite automaton that reads the token ids and says at which positions to act."""

from fxgraft.kernels.token_automaton import op as op
