"""A finite automaton over token ids whose states lie in a pool of slots, which it updates."""

from fxgraft.kernels.token_automaton_slots import op as op
