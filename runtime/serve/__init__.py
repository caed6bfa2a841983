"""An HTTP server with OpenAI's interface over an engine.

``app`` has the routes, ``service`` what happens to a request, ``worker`` the thread that the engine
runs in, ``server`` the process: signals and draining. May import everything but ``fxgraft.cli``;
needs the extra ``serve``.
"""
