"""Serve heads as the drafter of an inference engine: the draft class for vLLM, and the folder that
it loads."""


def register() -> None:
    """Register the draft class with vLLM, which calls this in each process (entry point
    `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    from caft_plugin.serving.families import ARCHITECTURE

    # By name, so that the module is only imported in processes that serve such a drafter.
    ModelRegistry.register_model(ARCHITECTURE, f"caft_plugin.serving.parallel:{ARCHITECTURE}")
