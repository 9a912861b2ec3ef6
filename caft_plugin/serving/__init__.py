"""Serve heads as the drafter of an inference engine: what vLLM loads, and the folder that it loads from."""


def register() -> None:
    """Tell vLLM of the draft class. vLLM calls this in each of its processes (entry point `vllm.general_plugins`)."""
    from vllm import ModelRegistry

    from caft_plugin.serving.families import ARCHITECTURE

    # By name: the module is imported in a process that serves such a drafter, and in no other.
    ModelRegistry.register_model(ARCHITECTURE, f"caft_plugin.serving.parallel:{ARCHITECTURE}")
