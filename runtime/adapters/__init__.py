"""Compiled models in the clothes of other libraries' models.

``transformers_pipeline`` makes a compiled model acceptable to ``transformers.pipeline``,
``lm_eval`` to the lm-evaluation-harness (an optional package). They need of a compiled model its
``program``, its call (giving ``logits``) and ``generate``; import either module by its name.
"""
