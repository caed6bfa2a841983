"""Cost of ``token_automaton_slots``: that of ``token_automaton``."""

from fxgraft.kernels.token_automaton.cost import flops as flops
