"""Small random models of the model types of transformers. Importing this loads no torch."""

# The dense and MoE families of the documentation and the tests; every other causal type of the installed transformers
# is built by the same rules.
KNOWN: tuple[str, ...] = (
    "bloom",
    "cohere2",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)


def known() -> tuple[str, ...]:
    """Return the families that are known without importing transformers."""
    return KNOWN
